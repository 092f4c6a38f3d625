"""Reads a sealed directory that was pushed to the Hugging Face Hub: hf://OWNER/NAME or hf://OWNER/NAME@REVISION.

Only `python -m tasks.trace` names such places: no recipe, artifact or recorded parent can (`storage.check_path`).
HF_ENDPOINT and HF_TOKEN are the Hub's own settings.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from eval.files import file_sha256
from tasks.manifest import MANIFEST, Manifest, check_covers, parse_manifest

PREFIX = "hf://"
ADDED_BY_THE_HUB = {".gitattributes"}
_FORM = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub(uri: str) -> bool:
    return uri.startswith(PREFIX)


def pinned(uri: str) -> str:
    """The URI with the commit of its revision (default: the newest).

    Raises:
        ValueError: wrong form, or no such repository or revision, or no access.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo, revision = _parts(uri)
    try:
        return f"{PREFIX}{repo}@{_api().repo_info(repo, revision=revision).sha}"
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"{uri}: the Hub has no such repository or revision, or HF_TOKEN may not read it") from error


def load(uri: str) -> Manifest:
    """The manifest, unverified.

    Raises:
        ValueError: there is no manifest, or it is not of this project.
    """
    if MANIFEST not in _files(uri):
        raise ValueError(f"{uri} is not a sealed directory: it has no {MANIFEST}")
    with tempfile.TemporaryDirectory() as folder:
        return parse_manifest(_download(uri, MANIFEST, folder).read_bytes(), f"{uri}/{MANIFEST}")


def check(uri: str, kind: str | None, digest: str | None) -> Manifest:
    """Downloads every file, one at a time, compares it, and deletes it.

    Raises:
        ValueError: names the first file that is missing, added or changed, or the manifest itself.
    """
    manifest = load(uri)
    check_covers(manifest, uri, kind, digest)
    present, expected = sizes(uri).keys(), manifest.files | manifest.logs
    for name in sorted(expected.keys() - present):
        raise ValueError(f"{uri} lacks {name}, which its manifest lists")
    for name in sorted(present - expected.keys()):
        raise ValueError(f"{uri} holds {name}, which its manifest does not list")
    for name, wanted in sorted(expected.items()):
        with tempfile.TemporaryDirectory() as folder:
            if file_sha256(_download(uri, name, folder)) != wanted:
                raise ValueError(f"{uri}/{name} was changed: its SHA-256 is not the manifest's {wanted}")
    return manifest


def sizes(uri: str) -> dict[str, int]:
    """Path in the repository -> bytes, of every file except the manifest and files that the Hub adds."""
    return {name: size for name, size in _files(uri).items() if name != MANIFEST and name not in ADDED_BY_THE_HUB}


@functools.lru_cache(maxsize=8)  # at a commit, a listing does not change
def _files(uri: str) -> dict[str, int]:
    repo, revision = _parts(uri)
    entries = _api().list_repo_tree(repo, revision=revision, recursive=True)
    return {entry.path: int(entry.size) for entry in entries if hasattr(entry, "blob_id")}  # files, not folders


def _download(uri: str, name: str, folder: str) -> Path:
    repo, revision = _parts(uri)
    return Path(_api().hf_hub_download(repo, name, revision=revision, local_dir=folder))


def _parts(uri: str) -> tuple[str, str | None]:
    match = _FORM.fullmatch(uri)
    if not match:
        raise ValueError(f"{uri!r} must look like hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return match[1], match[2]


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
