"""Pushes a sealed pipeline directory to the Hugging Face Hub, in one commit.

Not by `upload_large_folder`: it makes a commit for every few files, so that an interrupted push would be a mixture.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from model.logs import get_logger
from tasks.manifest import MANIFEST, Manifest, public_manifest, verify

logger = get_logger(__name__)

FRESH = {".gitattributes"}  # files that the Hub adds to a new repository


def push(
    directory: str | Path, repo_id: str, private: bool = True, api: Any = None, revision: str | None = None
) -> dict[str, Any]:
    """Makes the repository if it does not exist, uploads every file in one commit, and checks that all arrived.

    Running it again is safe: the Hub skips files that it has. Files of our older push that are not in the directory are
    deleted in the same commit; other files are not. The commit names its parent, so that one of two concurrent
    publishers fails.

    Args:
        directory: a sealed directory.
        repo_id: "name" or "owner/name".
        private: whether a new repository is private. An existing public one is then refused.
        api: a huggingface_hub.HfApi; default: one with the token of HF_TOKEN or `hf auth login`.
        revision: a branch, made from main if it does not exist; None: main.

    Returns:
        {"repo_id", "url", "commit", "files", "digest"}.

    Raises:
        ValueError: the directory does not verify, the Hub refuses the name or the token, the repository contains files
            of other origin, it is public although `private` is set, or a file is missing or different after the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, LocalTokenNotFoundError, validate_repo_id

    directory = Path(directory)
    manifest = verify(directory)
    validate_repo_id(repo_id)  # its error is a ValueError that names the id
    api = api or HfApi()
    wanted = [*manifest.files, *manifest.logs, MANIFEST]
    try:
        repo = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        repo_id = getattr(repo, "repo_id", repo_id)  # with the owner
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
        parent, stale = _look(api, repo_id, private, set(wanted), revision)
        logger.info(f"hub: pushing {len(wanted)} files to {repo_id}")
        commit = _commit(api, repo_id, directory, manifest, parent, stale, revision)
        there = _files(api, repo_id, commit.oid)
    except LocalTokenNotFoundError as error:
        raise ValueError("the Hub needs a token: set HF_TOKEN or run `hf auth login`") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(
                f"the Hub refuses to write to {repo_id} ({status}): set HF_TOKEN to a token that may write there"
            ) from error
        if status in (409, 412):
            raise ValueError(f"{repo_id} was changed by another commit meanwhile; run it again") from error
        raise
    sizes = {name: (directory / name).stat().st_size for name in (*manifest.files, *manifest.logs)}
    sizes[MANIFEST] = len(_public(manifest))
    for name, size in sizes.items():
        if name not in there:
            raise ValueError(f"{repo_id} lacks {name} after the push; run it again")
        if there[name].size != size:
            raise ValueError(f"{repo_id} holds {there[name].size} bytes of {name}, not {size}; run it again")
        lfs = getattr(there[name], "lfs", None)  # only large files have a SHA-256 there
        if lfs is not None and name in manifest.files and lfs.sha256 != manifest.files[name]:
            raise ValueError(f"{repo_id} holds another {name} than was pushed: SHA-256 {lfs.sha256}")
    return {
        "repo_id": repo_id,
        "url": f"https://huggingface.co/{repo_id}" + (f"/tree/{revision}" if revision else ""),
        "commit": commit.oid,
        "files": len(wanted),
        "digest": manifest.digest,
    }


def _public(manifest: Manifest) -> bytes:
    return public_manifest(manifest).model_dump_json(indent=1).encode()


def _files(api: Any, repo_id: str, revision: str | None) -> dict[str, Any]:
    entries = api.list_repo_tree(repo_id, repo_type="model", revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}  # files, not folders


def _look(
    api: Any, repo_id: str, private: bool, wanted: set[str], revision: str | None
) -> tuple[str | None, list[str]]:
    """(parent commit, files of an older push to delete).

    Raises:
        ValueError: the repository is public although `private` is set, or was not written by this project.
    """
    info = api.repo_info(repo_id, repo_type="model", revision=revision)
    if private and info.private is False:
        raise ValueError(
            f"{repo_id} is public, and publish.hub_private is true: set it to false to publish there, or choose another name"
        )
    there = set(_files(api, repo_id, info.sha))
    if not there - FRESH:
        return info.sha, []
    if MANIFEST not in there:
        raise ValueError(
            f"{repo_id} holds {len(there)} files, such as {min(there - FRESH)}, and no {MANIFEST} of a push like this one: "
            "nothing was changed; choose an empty repository or another name"
        )
    path = api.hf_hub_download(repo_id, MANIFEST, repo_type="model", revision=info.sha)
    try:
        fields = json.loads(Path(path).read_bytes())
        ours = {*fields["files"], *fields.get("logs", {}), MANIFEST}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{repo_id}: its {MANIFEST} is not of a push like this one; choose another name") from error
    return info.sha, sorted((ours & there) - wanted)


def _commit(
    api: Any,
    repo_id: str,
    directory: Path,
    manifest: Manifest,
    parent: str | None,
    stale: list[str],
    revision: str | None,
) -> Any:
    """One commit of links to the directory's files and the public manifest."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".pushing-") as staging:
        for name in (*manifest.files, *manifest.logs):
            (Path(staging) / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (Path(staging) / name).hardlink_to(directory / name)
            except OSError:  # a file system without links
                shutil.copyfile(directory / name, Path(staging) / name)
        (Path(staging) / MANIFEST).write_bytes(_public(manifest))
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=staging,
            commit_message=f"{manifest.kind} {manifest.digest}",
            revision=revision,
            parent_commit=parent,
            delete_patterns=stale or None,
        )
