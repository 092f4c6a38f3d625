"""Checks and completes the arguments of `pyflyte run --remote` on the user's machine before anything is uploaded.

    --recipe my_recipe.yaml     becomes the recipe's text: a pod does not have your file
    --source my_images/         is refused: a pod cannot read it
    run --remote FILE WORKFLOW  also gets, unless given: images by digest (containers/images.lock.json), project, domain and
                                profile (the section `nucleus` of the Flyte configuration), the recipe's number of
                                processes, all files of the project, and a folder that pods can unpack them to

`workflows.pyflyte_plugin` hooks this into pyflyte. Local runs do not change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich_click as click
import yaml

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "containers" / "images.lock.json"  # containers/build.py writes it
REGISTERED = {"remote-launchplan", "remote-workflow", "remote-task"}
FROM_SOURCE = {"ablate", "curate", "pretrain", "reproduce", "study"}  # workflows that read source.path of a recipe
CODE = "/scratch/code"  # the root of pods is read-only
RECIPE_FILES = (".yaml", ".yml")


def prepare(args: Sequence[str]) -> list[str]:
    """The arguments of pyflyte; those of a remote run are completed.

    Raises:
        click.UsageError: a recipe that is not valid, or a source that no pod can read.
    """
    args = list(args)
    if "run" not in args:
        return args
    first = args.index("run") + 1
    rest = args[first:]
    registered = bool(REGISTERED & set(rest))
    if not registered and not {"-r", "--remote"} & set(rest):
        return args
    try:
        return [*args[:first], *_completed(_config(args[:first]), rest, registered)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _completed(config: dict[str, Any], rest: list[str], registered: bool) -> list[str]:
    from tasks.planning.source import check_source
    from tasks.recipe import load_recipe, recipe_text

    given = _inputs_file(rest) | dict(_options(rest))
    recipe, source = given.get("--recipe"), given.get("--source", "")
    check_source(source, local=False)
    if recipe and Path(recipe).suffix in RECIPE_FILES:
        recipe = recipe_text(recipe)
        rest = [*_without(rest, "--recipe"), "--recipe", recipe]
    section = config.get("nucleus", {})
    defaults = [part for name in ("project", "domain") for part in _default(rest, f"--{name}", section.get(name))]
    if registered:
        return [*defaults, *rest]
    if recipe:
        loaded = load_recipe(recipe, _overrides(given.get("--overrides")))
        if FROM_SOURCE & set(rest):
            check_source(source or loaded.source.path or "", local=False)
        os.environ.setdefault("NUCLEUS_TRAIN_NNODES", str(loaded.train.nnodes))
        os.environ.setdefault("NUCLEUS_TRAIN_NPROC", str(loaded.train.nproc_per_node))
    _set_profile(section)
    if not {"-i", "--image"} & {word.partition("=")[0] for word in rest}:
        defaults += [part for image in _images() for part in ("--image", image)]
    defaults += _default(rest, "--copy", "all") + _default(rest, "--destination-dir", CODE)
    return [*defaults, *rest]


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of the arguments `--name value` and `--name=value`."""
    for word, following in zip(args, [*args[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            yield name, value if equals else following


def _without(args: Sequence[str], option: str) -> list[str]:
    kept, rest = [], iter(args)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name != option:
            kept.append(word)
        elif not equals:
            next(rest, "")
    return kept


def _inputs_file(args: Sequence[str]) -> dict[str, str]:
    """Inputs from --inputs-file; the command line overrides them."""
    path = dict(_options(args)).get("--inputs-file")
    if not path or not Path(path).is_file():
        return {}
    inputs = yaml.safe_load(Path(path).read_text())
    if not isinstance(inputs, dict):
        return {}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in inputs.items()}
    return {f"--{name}": text for name, text in texts.items()}


def _overrides(value: str | None) -> list[str]:
    if value is None:
        return []
    try:
        entries = json.loads(value)
    except ValueError:
        return [value]
    return entries if isinstance(entries, list) else [value]


def _default(args: Sequence[str], option: str, value: str | None) -> list[str]:
    return [option, value] if value and option not in dict(_options(args)) else []


def _config(before: Sequence[str]) -> dict[str, Any]:
    """The Flyte configuration that pyflyte will read: from --config, or from flytekit's default locations."""
    from flytekit.configuration import get_config_file

    named = [following for word, following in zip(before, before[1:]) if word in ("-c", "--config")]
    named += [word.partition("=")[2] for word in before if word.startswith("--config=")]
    if named and not Path(named[-1]).is_file():
        return {}  # pyflyte reports it
    config = get_config_file(named[-1] if named else None)
    content = config.yaml_config if config is not None else None
    return content or {}


def _set_profile(section: dict[str, Any]) -> None:
    """Sets the variables that tasks/envs.py reads when the workflows are loaded, unless the environment has them."""
    from tasks.site import SETTINGS

    for key, name in SETTINGS.items():
        if section.get(key):
            os.environ.setdefault(name, str(section[key]))


def _images() -> list[str]:
    if not LOCK.is_file():
        raise ValueError(
            f"no image is known: {LOCK} does not exist. Run make images REGISTRY=..., or give "
            "--image ROLE=REGISTRY/NAME@sha256:DIGEST for each role"
        )
    images = json.loads(LOCK.read_text())["images"]
    named = {role: f"{entry['image']}@{entry['digest']}" for role, entry in images.items()}
    os.environ.update({f"NUCLEUS_IMAGE_{role.upper()}": image for role, image in named.items()})  # for tasks/envs.py
    return [f"{role}={image}" for role, image in named.items()]
