"""Captioners by name. The recipe chooses one by `curation.captioner.name`.

A captioner is an entry in `CAPTIONERS` and a class (base.Captioner), imported only if a recipe names it.
"""

from __future__ import annotations

import pkgutil
from typing import NamedTuple

from model.names import hint
from tasks.curation.captioning.base import Answer, Captioner, Request
from tasks.curation.config import CaptionerConfig


class CaptionerSpec(NamedTuple):
    """A captioner that recipes can name.

    build: `module:class`, or a function of CaptionerConfig that builds it.
    check: `module:function` that refuses a CaptionerConfig with a ValueError before any work; "": no check.
    revision: raise it when its requests to the model change, so that captions are made again.
    needs: "cpu", or "gpu" if its task must have one.
    """

    name: str
    build: str
    check: str = ""
    revision: str = "1"
    needs: str = "cpu"


CAPTIONERS = (
    CaptionerSpec(
        "qwen3-vl",
        "tasks.curation.captioning.qwen_vl:QwenVL",
        check="tasks.curation.captioning.qwen_vl:check",
        needs="gpu",
    ),
    CaptionerSpec(
        "openai", "tasks.curation.captioning.endpoint:Endpoint", check="tasks.curation.captioning.endpoint:check"
    ),
    CaptionerSpec("scenes", "tasks.curation.captioning.scenes:SceneCaptioner"),
)


def chosen_captioner(config: CaptionerConfig) -> CaptionerSpec:
    """
    Raises:
        ValueError: there is no captioner of that name.
    """
    known = {spec.name: spec for spec in CAPTIONERS}
    if config.name not in known:
        raise ValueError(f"curation.captioner.name={config.name!r} is unknown; {hint(config.name, known)}")
    return known[config.name]


def check_captioner(config: CaptionerConfig) -> None:
    """Refuses, before any work, settings with which the captioner cannot run.

    Raises:
        ValueError: naming the setting.
    """
    spec = chosen_captioner(config)
    if spec.check:
        pkgutil.resolve_name(spec.check)(config)


def build_captioner(config: CaptionerConfig) -> Captioner:
    """
    Raises:
        ValueError: see `check_captioner`.
    """
    check_captioner(config)
    return pkgutil.resolve_name(chosen_captioner(config).build)(config)


def identity(config: CaptionerConfig) -> str:
    """Identifies the captioner and its model: the cache key of a caption contains it."""
    spec = chosen_captioner(config)
    weights = ":".join(part for part in (config.model, config.revision) if part)
    return f"{spec.name}@{spec.revision}" + (f" {weights}" if weights else "")


__all__ = [
    "CAPTIONERS",
    "Answer",
    "Captioner",
    "CaptionerSpec",
    "Request",
    "build_captioner",
    "check_captioner",
    "chosen_captioner",
    "identity",
]
