"""What other thresholds would keep, from the scores alone: `python -m tasks.curation.replay CURATED --overrides ...`.

    python -m tasks.curation.replay .nucleus/artifacts/curated/DIGEST --overrides curation.filters.min_side_px=96

No image is read. Prints one JSON line for each record whose fate changes ({"file", "before", "after"}), then a line
`kept BEFORE -> AFTER of RECORDS records` with the rules whose counts change. With --out DIR the new ledger and report are
kept there. Exits 1, with one line `ValueError: ...`, where the change needs new scores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq


def replay(curated_dir: Path, overrides: Sequence[str], out_dir: Path) -> tuple[dict, dict]:
    """Decides again about a curated directory's records; writes what decide.decide writes into the empty `out_dir`.

    Returns:
        the content of report.json before and after.

    Raises:
        ValueError: not a curated directory, an override that is not one of curation, or one that needs new scores.
    """
    from tasks.curation import decide
    from tasks.curation.config import CurationConfig
    from tasks.curation.sources.base import Account
    from tasks.manifest import load_manifest

    manifest = load_manifest(curated_dir)
    if manifest.kind != "curated":
        raise ValueError(f"{curated_dir} is of kind {manifest.kind!r}; a curated directory is needed")
    before = CurationConfig.model_validate(manifest.config)
    after = _overridden(before, overrides)
    if after.scoring() != before.scoring():
        raise ValueError(
            f"{', '.join(overrides)} changes the scores (scorers, formats, max_pixels and thumbnail_px do): "
            "run the curation again"
        )
    report = json.loads((curated_dir / "report.json").read_text())
    # The shards' own accounts are in their scores; the rest of the report's is the scan's.
    scan = Account.from_json(json.loads((curated_dir / "corpus" / "report.json").read_text())["account"])
    return report, decide.decide(list(_score_parts(curated_dir)), scan, after.deciding(), out_dir)


def _score_parts(curated_dir: Path) -> Iterator:
    """The scores behind each selections part: its parent."""
    from tasks.manifest import load_manifest
    from tasks.store import Part, fetch_part, read_index

    for selections in read_index(curated_dir):
        if selections.error:
            yield Part(selections.name, "scores", error=selections.error)
            continue
        (parent,) = load_manifest(fetch_part(selections)).parents
        scores = Part(selections.name, parent.kind, parent.digest, parent.uri)
        yield scores._replace(rows=load_manifest(fetch_part(scores)).counts["rows"])


def _overridden(config, overrides: Sequence[str]):
    from tasks.recipe import load_recipe

    for override in overrides:
        if not override.startswith("curation."):
            raise ValueError(f"{override!r} does not start with 'curation.': only decisions of curation are replayed")
    recipe = load_recipe("smoke").model_dump(mode="json") | {"curation": config.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replayed.yaml"
        path.write_text(json.dumps(recipe))
        return load_recipe(str(path), list(overrides)).curation


def changes(before: Path, after: Path) -> Iterator[dict]:
    """{"file", "before", "after"} of every record whose fate differs between two ledgers of the same records."""

    def rows(path: Path) -> Iterator[dict]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, columns=["file", "kept", "rule", "detail"]):
                yield from batch.to_pylist()

    for old, new in zip(rows(before), rows(after), strict=True):
        assert old["file"] == new["file"]
        if old["rule"] != new["rule"]:
            yield {"file": new["file"], "before": _fate(old), "after": _fate(new)}


def _fate(row: dict) -> str:
    return "kept" if row["kept"] else f"{row['rule']}: {row['detail']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.curation.replay", description=__doc__.splitlines()[0])
    parser.add_argument("curated", type=Path, help="a curated directory")
    parser.add_argument(
        "--overrides", action="append", default=[], help="a change such as curation.filters.min_side_px=96"
    )
    parser.add_argument("--out", type=Path, help="a new folder for the ledger and the report")
    options = parser.parse_args(arguments)
    try:
        if options.out and options.out.exists():
            raise ValueError(f"--out {options.out} exists; name a new folder")
        with tempfile.TemporaryDirectory() as folder:
            decision = Path(folder) / "decision"
            decision.mkdir()
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # lines of progress
                before, after = replay(options.curated, options.overrides, decision)
            for change in changes(options.curated / "ledger.parquet", decision / "ledger.parquet"):
                print(json.dumps(change, ensure_ascii=False))
            if options.out:
                options.out.mkdir(parents=True)
                for name in ("ledger.parquet", "report.json", "report.html"):
                    shutil.copyfile(decision / name, options.out / name)
    except ValueError as error:
        print(f"ValueError: {error}")
        return 1
    rules = [
        f"{rule} {count} -> {after['rejected'][rule]}"
        for rule, count in before["rejected"].items()
        if count != after["rejected"][rule]
    ]
    print(
        f"kept {before['kept']} -> {after['kept']} of {after['input']} records" + "".join(f"; {rule}" for rule in rules)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
