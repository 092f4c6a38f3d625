"""Merges a stage's last checkpoints with WSM weights, instead of a learning-rate decay (arXiv 2507.17634)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.config import MergeConfig, TransformerConfig
from model.logs import get_logger

logger = get_logger(__name__)


def merge_stage(
    checkpoints_dir: str | Path, transformer: TransformerConfig, merge: MergeConfig, out_dir: str | Path
) -> dict[str, Any]:
    """Merges the last `merge.last_n` checkpoints into `out_dir/transformer/` and writes `out_dir/report.json`.

    If a short stage has fewer checkpoints, all of them are merged, and the report has the number.

    Args:
        checkpoints_dir: contains `step-{n}/`, model weights in DCP format.
        transformer: the stage's model. Its capacity factors are written to config.json, where the pipeline reads them.
        merge: the number of checkpoints.
        out_dir: an empty directory.

    Returns:
        the report: {"steps": [oldest .. newest], "weights": [...], "wanted", "merged", "tensors", "parameters"}.

    Raises:
        ValueError: no finished checkpoint, or checkpoints that do not match `transformer` or each other.
    """
    from model.merge import merge as merge_checkpoints
    from model.merge import wsm_weights
    from model.weights.checkpoints import finished_checkpoints

    checkpoints = finished_checkpoints(checkpoints_dir)
    if not checkpoints:
        raise ValueError(f"{checkpoints_dir} has no finished checkpoint (step-*/ with a .metadata file) to merge")
    steps = sorted(checkpoints)[-merge.last_n :]
    weights = wsm_weights(len(steps))
    if len(steps) < merge.last_n:
        logger.warning(f"merge: merge.last_n={merge.last_n}, but only {len(steps)} checkpoints exist")
    logger.info(f"merge: {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}")
    merged = merge_checkpoints(
        [checkpoints[step] for step in steps], weights, Path(out_dir) / "transformer", config=transformer
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
