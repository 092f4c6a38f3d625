"""Removes places and people from settings that are published: paths, buckets, endpoints, accounts and addresses.

Any text is cut where a place in it begins (`_PLACE`), whatever its key. A Hub id stays; settings that may be a relative path are
replaced as a whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from eval.config import FILES
from model.names import commit_of

PRIVATE = "(private)"
SETTINGS = (
    "source.path",
    "source.captions_folder",
    "source.urls.user_agent",  # has an address for complaints
    "curation.takedown",
    "curation.captioner.endpoint",
    "train.checkpoint_uri",
    "publish.s3_uri",
    "publish.s3_bucket_owner",
)
KEPT = ("publish.title", "publish.license")  # texts for the public
# After a letter or digit a / is of a Hub id, a media type or a relative path. Each pattern is linear in the text.
_PLACE = re.compile(
    r"""(?:
      (?<![\w+.-])[A-Za-z][\w+.-]*://                                 # a URI
    | (?<![^\W_])(?<!\w_)(?!(?<=\d\.)/\d)(?!(?<=<)/\w+>)/(?=[^\s>])  # /PATH; not 1./2, </tag>, />
    | (?<![\w.])\.{1,2}[\\/] | (?<!\w)~[\w.-]*[\\/]                  # ./PATH, ../PATH, ~/PATH, ~USER/PATH
    | \$[A-Za-z_]\w*/ | %\w+%\\ | %2[Ff]                             # $NAME/PATH, %NAME%\PATH, a / in a URI's escapes
    | (?<![^\W_])[A-Za-z]:[\\/] | \\\\(?=\S)                         # C:\PATH, \\HOST\PATH
    | (?<![\w.-])(?=[\d._-]*[^\W\d_])[\w.-]+:\d{2,5}/(?!\d)          # HOST:PORT/, no ratio
    | (?<![\w.-])(?:[\w-]+\.)+[^\W\d_][\w-]*:\d{2,5}(?!\d)          # HOST.DOMAIN:PORT
    | (?<![\w.])(?:\d{1,3}\.){3}\d{1,3}[:/](?=\w)                   # IPv4:PORT, IPv4/PATH
    | (?<![^\s@])[^\s@]*@[\w-]+[.:](?=\w)                            # NAME@HOST.DOMAIN, NAME@HOST:PATH
    ).*""",
    re.DOTALL | re.VERBOSE,
)


def recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A whole recipe as `Recipe.model_dump(mode="json")`."""
    public = {name: evaluation(part) if name == "eval" else _cut(part) for name, part in settings.items()}
    for key in SETTINGS:
        _set(public, key.split("."), PRIVATE)
    for key in KEPT:
        section, name = key.split(".")
        if name in settings.get(section, {}):
            public[section][name] = settings[section][name]
    init_from = public.get("train", {}).get("init_from")
    if init_from and commit_of(init_from) is None:  # no repository at a commit
        public["train"]["init_from"] = PRIVATE
    return public


def evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `eval` section of a recipe, or the configuration of a scorecard."""
    public = _cut(dict(settings))
    for key in FILES:
        _set(public, [key], PRIVATE)
    if public.get("judges"):
        public["judges"] = {skill: _judge(name) for skill, name in public["judges"].items()}
    return public


def scorecard(card: Mapping[str, Any]) -> dict[str, Any]:
    """A scorecard, without places in its settings: its references name their public sources."""
    public = copy.deepcopy(dict(card))
    for key in ("config", "generation", "settings"):
        if key in public:
            public[key] = _cut(public[key])
    for holder in (public, public.get("generation") or {}):
        if holder.get("config"):
            holder["config"] = evaluation(holder["config"])
    return public


def _judge(name: str) -> str:
    """The judge without the directory of its weights; a commit stays."""
    base, separator, _ = name.partition("@")
    return f"{base}@{commit_of(name) or PRIVATE}" if separator else name


def _set(settings: Any, path: list[str], value: str) -> None:
    """Replaces a setting, unless it is unset."""
    for step in path[:-1]:
        settings = settings.get(step) or {}
    if settings.get(path[-1]) is not None:
        settings[path[-1]] = value


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return _PLACE.sub(PRIVATE, value)
    if isinstance(value, Mapping):
        return {_cut(key): _cut(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(one) for one in value]
    return value
