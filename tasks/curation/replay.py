"""Shows what other thresholds would keep, from columns alone: `python -m tasks.curation.replay DIRECTORY --overrides
...`.

    python -m tasks.curation.replay .nucleus/artifacts/curated/DIGEST --overrides curation.filters.min_side_px=96
    python -m tasks.curation.replay .nucleus/artifacts/scores/DIGEST --recipe tiny --overrides curation.tiers.synthetic_tier=A1

DIRECTORY is curated, or an index of scores; for an index, the recipe gives the current decision. No image is read. For
each kind of change of fate it prints up to --examples records as JSON lines ({"file", "before", "after"}), then the
counts of rules and tiers that change, then `kept BEFORE -> AFTER of RECORDS records`. --out DIR keeps the new ledger
and report. Exits 1, with one line `ValueError: ...`, if the change needs new scores or captions, or decides nothing.
`curation.takedown=LIST` also removes the records of LIST; those of an earlier list stay removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

LEDGER, REPORT = "ledger.parquet", "report.json"
# Settings that no decision depends on: see CurationConfig.deciding.
NOT_REPLAYED = {
    "captioner": "new captions must be written first: run workflows/caption.py, or the curation",
    "engine": "every engine decides the same",
    "max_groups": "it divides the work, and decides nothing",
    "concurrency": "it divides the work, and decides nothing",
    "min_success_ratio": "it concerns the scoring of shards: run the curation again",
}


def replay(directory: Path, overrides: Sequence[str], work_dir: Path, recipe: str = "") -> tuple[Path, Path]:
    """Repeats the decision on a curated directory or an index of scores.

    Args:
        recipe: of the current decision, for an index of scores; a curated directory has its own.

    Returns:
        two directories with ledger.parquet and report.json: without and with the overrides.

    Raises:
        ValueError: another kind of directory, an override outside curation, or one that needs new scores or captions
            or decides nothing.
    """
    from tasks.curation.config import CurationConfig
    from tasks.curation.sources.base import Account
    from tasks.manifest import load_manifest
    from tasks.recipe import load_recipe
    from tasks.store import read_index

    manifest = load_manifest(directory)
    if manifest.kind == "curated":
        config = CurationConfig.model_validate(manifest.config)
        # The shards' own accounts are in their scores; the rest of the report's account comes from the scan.
        scan = Account.from_json(json.loads((directory / "corpus" / REPORT).read_text())["account"])
        parts, before = list(_score_parts(directory)), directory
    elif manifest.kind == "scores" and recipe:
        config = load_recipe(recipe).curation
        config = config.deciding().model_copy(update={"takedown": config.takedown})
        scan, parts = Account(), list(read_index(directory))
        before = _decide(parts, scan, config, work_dir / "before")
    elif manifest.kind == "scores":
        raise ValueError(f"{directory} has scores: name the recipe that decides about them, such as --recipe tiny")
    else:
        raise ValueError(
            f"{directory} is of kind {manifest.kind!r}; a curated directory or an index of scores is needed"
        )
    after = _overridden(config, overrides)
    if after.scoring() != config.scoring():
        raise ValueError(
            f"{', '.join(overrides)} changes the scores (scorers, formats, max_pixels and thumbnail_px do): "
            "run the curation again"
        )
    return before, _decide(parts, scan, after, work_dir / "after")


def _decide(parts: list, scan, config, out_dir: Path) -> Path:
    from tasks.curation import takedown
    from tasks.curation.decisions import decide

    if config.takedown is not None:
        parts = takedown.remove(parts, takedown.read_list(config.takedown))
    out_dir.mkdir()
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # lines of progress
        decide.decide(parts, scan, config.deciding(), out_dir)
    return out_dir


def _score_parts(curated_dir: Path) -> Iterator:
    """The score part of each selections part: its parent."""
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
        key = re.split(r"[.=]", override.removeprefix("curation."), maxsplit=1)[0]
        if key in NOT_REPLAYED:
            raise ValueError(f"curation.{key} is not replayed: {NOT_REPLAYED[key]}")
    recipe = load_recipe("smoke").model_dump(mode="json") | {"curation": config.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replayed.yaml"
        path.write_text(json.dumps(recipe))
        return load_recipe(str(path), list(overrides)).curation


def _changed(before: Path, after: Path) -> Iterator[tuple[dict, dict]]:
    """The rows of two ledgers of the same records whose rules differ."""

    def rows(path: Path) -> Iterator[dict]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, columns=["file", "kept", "rule", "detail"]):
                yield from batch.to_pylist()

    for old, new in zip(rows(before), rows(after), strict=True):
        assert old["file"] == new["file"]
        if old["rule"] != new["rule"]:
            yield old, new


def _fate(row: dict) -> str:
    return "kept" if row["kept"] else f"{row['rule']}: {row['detail']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.curation.replay", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a curated directory, or an index of scores")
    parser.add_argument(
        "--overrides", action="append", default=[], help="a change such as curation.filters.min_side_px=96"
    )
    parser.add_argument("--recipe", default="", help="of scores: the recipe that decides about them")
    parser.add_argument("--examples", type=int, default=10, help="records printed of each change of fate")
    parser.add_argument("--out", type=Path, help="a new folder for the ledger and the report")
    options = parser.parse_args(arguments)
    try:
        if options.out and options.out.exists():
            raise ValueError(f"--out {options.out} exists; name a new folder")
        with tempfile.TemporaryDirectory() as folder:
            before, after = replay(options.directory, options.overrides, Path(folder), options.recipe)
            shown: Counter[tuple[str, str]] = Counter()
            for old, new in _changed(before / LEDGER, after / LEDGER):
                change = old["rule"], new["rule"]
                shown[change] += 1
                if shown[change] <= options.examples:
                    line = {"file": new["file"], "before": _fate(old), "after": _fate(new)}
                    print(json.dumps(line, ensure_ascii=False))
            for (old_rule, new_rule), count in shown.items():
                if count > options.examples:
                    print(f"{count - options.examples} more change from {old_rule or 'kept'} to {new_rule or 'kept'}")
            counts = [json.loads((place / REPORT).read_text()) for place in (before, after)]
            if options.out:
                options.out.mkdir(parents=True)
                for name in (LEDGER, REPORT, "report.html"):
                    shutil.copyfile(after / name, options.out / name)
    except ValueError as error:
        print(f"ValueError: {error}")
        return 1
    for section in ("rejected", "tiers"):
        old, new = (content[section] for content in counts)
        changed = [name for name in new if old.get(name, 0) != new[name]]
        if changed:
            print(f"{section}: " + "; ".join(f"{name} {old.get(name, 0)} -> {new[name]}" for name in changed))
    print(f"kept {counts[0]['kept']} -> {counts[1]['kept']} of {counts[1]['input']} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
