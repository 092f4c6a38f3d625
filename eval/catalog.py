"""The benchmarks and judges there are, by name: loaded when they are asked for, and not before.

An entry is `module:object`. A benchmark is an object (eval.protocols.Benchmark); a judge is a function that takes no
argument and returns one (eval.protocols.Judge), since loading one may take gigabytes.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.protocols import Benchmark, Judge

BENCHMARKS = {
    "shapes": ("eval.detection:SHAPES", "GenEval's six tasks on coloured shapes; judged without a model"),
    "geneval": ("eval.detection:GENEVAL", "553 prompts: objects, counts, colours, positions; needs its prompt file"),
}
JUDGES = {
    "shapes-detector": ("eval.detection:shapes_detector", "classical image processing for the shapes benchmark"),
}
_TABLES = {"benchmark": BENCHMARKS, "judge": JUDGES}


def check_name(kind: str, name: str) -> None:
    """
    Raises:
        ValueError: no such benchmark or judge; names the nearest.
    """
    table = _TABLES[kind]
    if name in table:
        return
    close = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"there is no {kind} {name!r}{hint} (there are {', '.join(sorted(table))})")


def benchmark(name: str) -> Benchmark:
    """
    Raises:
        ValueError: see `check_name`.
    """
    check_name("benchmark", name)
    return _load(BENCHMARKS[name][0])


def judge(name: str) -> Judge:
    """Makes the judge: its weights are loaded now.

    Raises:
        ValueError: see `check_name`; or what it needs is not installed.
    """
    check_name("judge", name)
    target = JUDGES[name][0]
    try:
        return _load(target)()
    except ImportError as error:
        raise ValueError(f"judge {name!r} needs a package that is not installed: {error}") from error


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
