"""Reads recipe files: YAML with 1.2 scalars, without duplicate keys, and with overlays on a base recipe.

The reasons are in docs/decisions/ablations.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
MAX_FILE_BYTES = 1 << 18
MAX_VALUES = 5_000  # with aliases expanded; a recipe has about 200


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, not PyYAML's 1.1, which reads 1e-4 as text and 16:9 as the number 969; no duplicate keys.

    A file may have `MAX_VALUES` values with aliases expanded (nine lines of nested aliases are a billion); a larger
    file is refused while it is read.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES:,} values", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        try:
            node = super().get_single_node()
            if node is not None and _count(node, {}) > MAX_VALUES:
                raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES:,} values", node.start_mark)
        except RecursionError:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", None) from None
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node; values behind aliases count each time.

    Raises:
        ComposerError: a node contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inside)
    if known[id(node)] < 0:
        raise yaml.composer.ComposerError(None, None, "an alias stands for a value that contains it", node.start_mark)
    return known[id(node)]


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str | bytes, where: str) -> Any:
    """The values of a YAML text.

    Args:
        where: its file or option, for the error.

    Raises:
        ValueError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        for mark in (getattr(error, "context_mark", None), getattr(error, "problem_mark", None)):
            if mark is not None:
                mark.buffer = None  # a quote of the text may have a part of a password that no longer looks like one
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping of a recipe file; its keys and values are not checked here.

    A file with a key `base`, a recipe's path relative to the file, is an overlay: its values replace those of the base.
    Mappings are merged key by key; other values, including lists, are replaced whole. The path ends in .yaml or .yml,
    and is relative or in the folder of the project's recipes, so that a recipe from an untrusted source reads no other
    files.

    Raises:
        ValueError: no such file, not YAML, not a mapping, bases that form a cycle, or an overlay without its own name.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        circle = " -> ".join(file.name for file in (*above, path))
        raise ValueError(f"{above[0]}: the bases form a cycle: {circle}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: it is not a recipe")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    data = parse(content, str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(data).__name__}")
    if "base" not in data:
        return data
    base = data.pop("base")
    valid = isinstance(base, str) and base.endswith((".yaml", ".yml"))
    if valid and Path(base).is_absolute():
        valid = Path(base).resolve().is_relative_to(SHIPPED)
    if not valid or not (path.parent / base).is_file():
        raise ValueError(
            f"{path}: base={base!r} must be the path of a recipe file, as seen from {path.parent}: "
            "relative or below the recipes that come with the code, and a .yaml"
        )
    if "name" not in data:
        raise ValueError(f"{path}: an overlay needs its own name")
    return _join(_read(path.parent / base, (*above, path.resolve())), data)


def _join(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in over if isinstance(base.get(key), dict) and isinstance(over[key], dict)}
    return base | {key: _join(base[key], value) if key in both else value for key, value in over.items()}
