"""Prints the fate of each file of a source, without training: `python -m tasks.curation.check SOURCE [--recipe NAME]`.

Prints one JSON line for each image ({"file", "captions", "fate"}; fate is "kept" or "rule: detail"), then a line
`skipped {reason: [count, example]}` for other files. Exits 1, with one line `ValueError: ...`, if the source is refused
or no record is kept. The limit of words of a caption is printed to standard error.

Scores stay under NUCLEUS_HOME, so that a run on the same source reuses them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq


def fates(decision_dir: Path) -> Iterator[dict]:
    """{"file", "captions", "fate"} of every record, in the order of the ledger, with the captions that were read."""
    from tasks.curation import ledger
    from tasks.curation.decisions import decide
    from tasks.curation.scoring import score
    from tasks.store import read_index

    book = pq.ParquetFile(decision_dir / ledger.LEDGER_TABLE)
    rows = (row for batch in book.iter_batches(columns=["file", "kept", "rule", "detail"]) for row in batch.to_pylist())
    for index in sorted((decision_dir / decide.SCORES_INDEX).iterdir()):
        for part in read_index(index):
            captions = [[]]
            if not part.error:
                directory = decide.fetch_columns(part)
                captions = pq.read_table(directory / score.SCORES_TABLE, columns=["captions"])["captions"].to_pylist()
            for texts, row in zip(captions, rows, strict=False):
                fate = "kept" if row["kept"] else f"{row['rule']}: {row['detail']}"
                yield {"file": row["file"], "captions": texts, "fate": fate}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.curation.check", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder (or s3:// URI) of images with captions, tars or Parquet files")
    parser.add_argument("--recipe", default="smoke", help="a recipe's name or path (default: %(default)s)")
    parser.add_argument(
        "--overrides", action="append", default=[], help="a change such as curation.captions.max_words=40"
    )
    options = parser.parse_args(arguments)
    try:
        return _check(options)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        return 1


def _check(options: argparse.Namespace) -> int:
    from tasks.curation import flow
    from tasks.curation.sources import base
    from tasks.planning import word_limit
    from tasks.planning.local_run import check_home
    from tasks.planning.sections import for_own_images
    from tasks.planning.source import check_source
    from tasks.recipe import load_recipe
    from tasks.store import fetch_part, home

    if not options.source:
        raise ValueError("the source is ''; give a folder (or s3:// URI) of images, a tar or a Parquet file")
    check_home(home())
    check_source(options.source, True)
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.source.is_made:  # as workflows do
        chosen, given = word_limit.is_chosen(options.recipe, options.overrides), recipe
        recipe = for_own_images(given, chosen)
        print(word_limit.line(given, recipe, chosen), file=sys.stderr)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # lines of progress
        _, decision = flow.curate_source(recipe.source, options.source, recipe.curation, until="decisions")
    directory = fetch_part(decision)
    for line in fates(directory):
        print(json.dumps(line, ensure_ascii=False))
    content = json.loads((directory / base.REPORT).read_text())
    print("skipped", json.dumps(content["account"]["skipped"], ensure_ascii=False))
    flow.result_line(directory, decision, recipe.curation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
