"""The model to score: resolves its location and the digest of its weights, and loads it.

.nucleus/artifacts/pipeline/DIGEST        a published pipeline, or any directory that diffusers loads
.nucleus/artifacts/merged/DIGEST          merged weights, with --components DIR
s3://BUCKET/PREFIX                        the version published last; or one sealed directory
OWNER/NAME with a commit                  the Hub
newest                                    the pipeline sealed last under NUCLEUS_HOME
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from eval import catalog
from eval.config import FILES, SchedulerConfig, stored_settings
from eval.generation import pipelines
from model import storage
from model.logs import get_logger
from model.names import commit_of
from tasks.manifest import MANIFEST, load_manifest, verify
from tasks.sealed import newest_pipeline
from tasks.store import home

logger = get_logger(__name__)

NEWEST = "newest"
_DIGEST = re.compile(r"[0-9a-f]{64}")
LATEST = "latest.json"  # of tasks.publishing.s3: the pointer to the version that was published last


class Model(BaseModel):
    """`place`: a directory, a URI or a Hub id. `digest` names the weights: of the sealed directory, of its files, or the
    commit; with components, both digests. `components`: the place of merged weights' components, else ""."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    place: str
    digest: str
    components: str = ""

    def digests(self) -> dict[str, str]:
        """{"merged", "components"} or {"model"}."""
        if not self.components:
            return {"model": self.digest}
        merged, components = self.digest.split("+")
        return {"merged": merged, "components": components}


class Loaded(NamedTuple):
    pipeline: Any
    provenance: dict[str, Any]


def resolve(model: str, revision: str = "", components: str = "", local: bool = True) -> Model:
    """Resolves a model to a digest of its weights. Reads no weights of a sealed directory.

    Args:
        revision: the commit of a Hub id; "": the newest, from the Hub.
        components: a sealed directory of kind components, for merged weights.
        local: whether the loading machine can read paths of this machine.

    Raises:
        ValueError: the model does not exist, or cannot be loaded from its location.
    """
    if model == NEWEST:
        if not local:
            raise ValueError("model 'newest' is the newest on your machine; on a cluster give an s3:// URI or a Hub id")
        model = str(newest_pipeline())
    if "@" in model and not revision and pipelines.is_hub_id(model.partition("@")[0]):
        model, _, revision = model.partition("@")
    if storage.is_remote(storage.check_path(model)):
        return _remote(model, components)
    if pipelines.is_hub_id(model) and not components:
        return Model(place=model, digest=revision or _newest_commit(model))
    path = Path(model).resolve()
    if not local:
        raise ValueError(f"model {model!r} is a path of your machine, which the cluster cannot read; give an s3:// URI")
    if not path.is_dir():
        raise ValueError(f"model {model!r} is neither a directory, nor a Hub id (OWNER/NAME), nor an s3:// URI, nor 'newest'")  # fmt: skip
    if revision:
        raise ValueError(f"{model} is a directory, which has no revision ({revision})")
    if components:
        parts = path, Path(components).resolve()
        for part, kind in zip(parts, ("merged", "components"), strict=True):
            if load_manifest(part).kind != kind:
                raise ValueError(f"{part} is an artifact of kind {load_manifest(part).kind!r}; {kind!r} is needed")
        digests = [load_manifest(part).digest for part in parts]
        return Model(place=str(path), digest="+".join(digests), components=str(parts[1]))
    if (path / "transformer").is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{model} has a transformer alone: name its components too (--components DIR)")
    digest = load_manifest(path).digest if (path / MANIFEST).is_file() else pipelines.resolve(str(path))
    return Model(place=str(path), digest=digest)


def resolve_incumbent(model: str, revision: str = "", components: str = "", local: bool = True) -> Model:
    """`resolve` of the model that candidates are compared with.

    Args:
        components: for merged weights, of the incumbent or a candidate; a pipeline has its own.
    """
    return resolve(model, revision, components if kind_of(model) == "merged" else "", local)


def kind_of(place: str) -> str | None:
    """The kind in the manifest of a sealed directory, local or in a store; None for a Hub id or without a manifest.

    Raises:
        ValueError: the manifest is damaged.
    """
    if place == NEWEST or pipelines.is_hub_id(place.partition("@")[0]):
        return None
    content = storage.read_bytes(storage.join(storage.check_path(place), MANIFEST))
    if content is None:
        return None
    try:
        return str(json.loads(content)["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{storage.join(place, MANIFEST)} is not a manifest: {error!r}") from error


def _remote(uri: str, components: str) -> Model:
    if components:
        digests = [_sealed(place) for place in (uri, components)]
        return Model(place=uri, digest="+".join(digests), components=components)
    pointer = storage.read_bytes(storage.join(uri, LATEST))
    if pointer is None:
        return Model(place=uri, digest=_sealed(uri))
    try:
        latest = json.loads(pointer)
        place, digest = storage.check_path(latest["uri"]), latest["digest"]
        if not storage.is_remote(place) or not _DIGEST.fullmatch(digest):  # it also names a local folder
            raise ValueError("it must have an s3:// uri, and a digest of 64 hexadecimal digits")
        return Model(place=place, digest=digest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{storage.join(uri, LATEST)} is not a pointer to a published version: {error}") from error


def _sealed(uri: str) -> str:
    digest = storage.sealed_digest(uri)
    if digest is None:
        raise ValueError(
            f"{uri} is neither a sealed directory ({MANIFEST}) nor a place of published versions ({LATEST})"
        )
    return digest


def _newest_commit(model: str) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(model).sha
    except Exception as error:  # errors of the network, the Hub, or authentication
        raise ValueError(
            f"the Hub does not say which commit of {model} is the newest ({type(error).__name__}: {error}); name one "
            "with --revision"
        ) from error
    return str(commit)


def published_settings(model: Model) -> dict[str, Any] | None:
    """The eval section with which a published pipeline was scored, without the files that it names: its author must not choose
    what is read here. None for other models.

    Raises:
        ValueError: it names code, which the pipeline's author would have imported here.
    """
    content = storage.read_bytes(storage.join(model.place, MANIFEST)) if not pipelines.is_hub_id(model.place) else None
    if content is None or model.components:
        return None
    settings = json.loads(content).get("config", {}).get("recipe", {}).get("eval")
    catalog.refuse_code(settings, f"the manifest of {model.place}")
    return _without_files(stored_settings(settings), model.place) if isinstance(settings, dict) else None


def _without_files(settings: dict[str, Any], place: str) -> dict[str, Any]:
    """Drops prompt files, and judges whose weights are no commit of their repository; names them in the log."""
    judges = settings.get("judges")
    judges = judges if isinstance(judges, dict) else {}
    kept = {skill: name for skill, name in judges.items() if "@" not in str(name) or commit_of(str(name))}
    dropped = [key for key in FILES if settings.get(key) is not None]
    dropped += [f"judges.{skill}" for skill in judges if skill not in kept]
    if dropped:
        logger.warning(
            f"{place} was scored with files that its manifest names for {', '.join(dropped)}, which are not read: the "
            "benchmark's own are used; name yours in overrides"
        )
    settings = {key: value for key, value in settings.items() if key not in dropped}
    return {**settings, "judges": kept} if "judges" in settings else settings


def load(model: Model, scheduler: SchedulerConfig = SchedulerConfig()) -> Loaded:
    """The pipeline, on its device. A sealed directory is verified first.

    Raises:
        ValueError: it changed since it was resolved.
    """
    if model.components:
        from tasks.evaluation.evaluate import load_pipeline

        parts = [
            _here(place, digest) for place, digest in zip((model.place, model.components), model.digest.split("+"))
        ]
        return Loaded(load_pipeline(*parts, scheduler), model.digests())
    if pipelines.is_hub_id(model.place):
        pipeline, provenance = pipelines.load_pipeline(model.place, revision=model.digest)
        return Loaded(pipeline, provenance)
    path = _here(model.place, model.digest)
    pipeline, provenance = pipelines.load_pipeline(str(path))
    if (path / MANIFEST).is_file():
        return Loaded(pipeline, {"pipeline": model.digest})
    if provenance["digest"] != model.digest:
        raise ValueError(
            f"{path} changed since it was resolved: its digest is {provenance['digest']}, not {model.digest}"
        )
    return Loaded(pipeline, provenance)


def _here(place: str, digest: str) -> Path:
    """The directory on this machine; verified if it is sealed."""
    path = Path(place)
    if storage.is_remote(place):
        path = home() / "models" / digest
        if not (path / MANIFEST).is_file():
            temporary = path.with_name(f".{digest}.{uuid.uuid4().hex}")
            try:
                storage.copy_folder(place, temporary)
                with contextlib.suppress(OSError):  # another process was first
                    os.replace(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    if (path / MANIFEST).is_file():
        verify(path, digest=digest)
    return path
