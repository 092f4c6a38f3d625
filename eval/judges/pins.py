"""SHA-256 of published weights that no hub stores by commit: only with them a score has the benchmark's plain name.

    python -m eval.judges.pins mplug DIR       # after the comparison with the official code that docs/evaluation.md describes

writes pins.json to this folder, {judge: {file: SHA-256}}, to be reviewed and committed. Weights with other bytes give
scores other names. None are pinned yet: the releases have not been downloaded here.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.judges import registry
from eval.judges.base import file_sha256

PINS = Path(__file__).parent / "pins.json"


def digests(folder: Path, files: Sequence[str], judge: str) -> dict[str, str]:
    """{file: SHA-256}.

    Raises:
        ValueError: a file is absent.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"judge {judge} needs a directory with {', '.join(files)}, as {judge}@DIR; {str(folder)!r} has no {missing[0]}"
        )
    return {name: file_sha256(folder / name) for name in files}


def read_pins(path: Path | None = None) -> dict[str, dict[str, str]]:
    """{judge: {file: SHA-256}}.

    Raises:
        ValueError: the file is damaged.
    """
    path = path or PINS
    if not path.is_file():
        return {}
    try:
        return {name: dict(files) for name, files in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the pins of judges: {error}") from error


def is_pinned(judge: str, files: Mapping[str, str]) -> bool:
    return bool(files) and read_pins().get(judge) == dict(files)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [name for name, entry in registry.JUDGES.items() if hasattr(pkgutil.resolve_name(entry.target), "FILES")]
    parser = argparse.ArgumentParser(prog="python -m eval.judges.pins", description="Pins a judge's weights.")
    parser.add_argument("judge", choices=names)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    judge = pkgutil.resolve_name(registry.JUDGES[options.judge].target)
    try:
        pins = {**read_pins(), options.judge: digests(options.folder, judge.FILES, options.judge)}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    temporary = PINS.with_suffix(".tmp")
    temporary.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(PINS)
    print(f"{PINS}: {options.judge}, {len(judge.FILES)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
