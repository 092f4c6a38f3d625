"""Reads recipe files: YAML with 1.2 scalars, without duplicate keys, and with overlays on a base recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, not PyYAML's 1.1, which reads 1e-4 as text and 16:9 as the number 969; keys once only."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping of a recipe file; what it means is not checked here.

    A file with a key `base`, a recipe's path as seen from the file, is an overlay: it is that recipe with the
    overlay's own values in place. Mappings are joined key by key; anything else, lists too, is replaced whole.

    Raises:
        ValueError: no such file, not YAML, not a mapping, bases that go round in a circle, or an overlay without a
            name of its own.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        circle = " -> ".join(file.name for file in (*above, path))
        raise ValueError(f"{above[0]}: the bases form a cycle: {circle}")
    try:
        data = yaml.load(path.read_bytes(), Loader=Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(data).__name__}")
    if "base" not in data:
        return data
    base = data.pop("base")
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise ValueError(f"{path}: base={base!r} must be the path of a recipe file, as seen from {path.parent}")
    if "name" not in data:
        raise ValueError(f"{path}: an overlay needs a name of its own")
    return _join(_read(path.parent / base, (*above, path.resolve())), data)


def _join(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in over if isinstance(base.get(key), dict) and isinstance(over[key], dict)}
    return base | {key: _join(base[key], value) if key in both else value for key, value in over.items()}
