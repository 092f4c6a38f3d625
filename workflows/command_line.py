"""Lets `pyflyte run` take `--overrides` several times.

click silently keeps the last value of a repeated option, and flytekit cannot declare an option as repeatable. So
repeats are joined into one JSON list, which every workflow here accepts, before click parses the command. It works for
files, registered workflows and launch plans alike.

`workflows.pyflyte_plugin` hooks this into pyflyte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

OPTION = "--overrides"


def join_overrides(args: Sequence[str]) -> list[str]:
    """The arguments of a command, with several values of --overrides joined into one JSON list.

    A value that is a JSON list counts as its entries.
    """
    kept: list[str] = []
    values: list[str] = []
    first = 0
    rest = iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            kept.append(argument)
            continue
        first = first if values else len(kept)
        values.append(value if equals else next(rest, ""))
    if len(values) < 2:
        return list(args)
    changes = [change for value in values for change in _entries(value)]
    return [*kept[:first], OPTION, json.dumps(changes), *kept[first:]]


def _entries(value: str) -> list[str]:
    try:
        entries = json.loads(value)
    except ValueError:
        return [value]
    return entries if isinstance(entries, list) else [value]
