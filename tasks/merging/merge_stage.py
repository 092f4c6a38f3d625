"""The WSM merge of a stage's last checkpoints, in place of a learning-rate decay (arXiv 2507.17634)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.config import MergeConfig, TransformerConfig


def merge_stage(
    checkpoints_dir: str | Path, transformer: TransformerConfig, merge: MergeConfig, out_dir: str | Path
) -> dict[str, Any]:
    """Merges the last `merge.last_n` checkpoints into `out_dir/transformer/` and writes `out_dir/report.json`.

    Where a short stage left fewer checkpoints, all of them are merged and the report says so.

    Args:
        checkpoints_dir: holds `step-{n}/`, each the model alone as DCP.
        transformer: of the stage: its capacity factors go into config.json, where the pipeline reads them.
        merge: how many.
        out_dir: an empty directory.

    Returns:
        the report: {"steps": [old .. new], "weights": [...], "wanted", "merged", "tensors", "parameters"}.

    Raises:
        ValueError: no finished checkpoint, or checkpoints that do not fit `transformer` or each other.
    """
    from model.merge import merge as merge_checkpoints
    from model.merge import wsm_weights
    from model.weights.checkpoints import finished_checkpoints

    found = finished_checkpoints(checkpoints_dir)
    if not found:
        raise ValueError(f"{checkpoints_dir} holds no finished checkpoint (step-*/ with a .metadata file) to merge")
    steps = sorted(found)[-merge.last_n :]
    weights = wsm_weights(len(steps))
    if len(steps) < merge.last_n:
        print(f"merge: {len(steps)} checkpoints there, {merge.last_n} wanted; merging those", flush=True)
    print(f"merge: {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}", flush=True)
    merged = merge_checkpoints(
        [found[step] for step in steps], weights, Path(out_dir) / "transformer", config=transformer
    )
    report = {
        "steps": steps,
        "weights": weights,
        "wanted": merge.last_n,
        "merged": len(steps),
        "tensors": merged["tensors"],
        "parameters": merged["parameters"],
    }
    (Path(out_dir) / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
