"""Records a judge's answers to its probes, or checks them: `python -m eval.judges.selftest NAME [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.judges import registry
from eval.judges.base import RECORDS, BaseJudge


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.judges.selftest", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(registry.JUDGES)}, with @PLACE of its weights if need be")
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing it")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of records")
    options = parser.parse_args(arguments)
    try:
        judge = registry.load(options.name)
        if options.check:
            judge.selftest()
            print(f"{judge.name}: as recorded, revision {judge.revision[:12]}")
        elif isinstance(judge, BaseJudge):
            print(f"{judge.record(options.out)}: revision {judge.revision[:12]}")
        else:
            raise ValueError(f"judge {options.name!r} has its own self-test, which records nothing")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
