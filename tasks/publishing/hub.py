"""Pushes a sealed pipeline directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.manifest import MANIFEST, verify


def push(directory: str | Path, repo_id: str, private: bool = True, api: Any = None) -> dict[str, Any]:
    """Makes the repository if it is absent, uploads every file in one commit, and looks whether all of it arrived.

    Running it again is safe: the Hub skips files that it has. Files of an older push that are not in the directory
    are deleted in the same commit.

    Args:
        directory: a sealed directory.
        repo_id: "name" or "owner/name".
        private: whether a repository that is made here is private; one that exists stays as it is.
        api: a huggingface_hub.HfApi; default: one with the token of HF_TOKEN or `hf auth login`.

    Returns:
        {"repo_id", "url", "commit", "files", "digest"}.

    Raises:
        ValueError: the directory does not verify, the Hub refuses the name or the token, or a file is missing or
            different after the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, LocalTokenNotFoundError, validate_repo_id

    directory = Path(directory)
    manifest = verify(directory)
    validate_repo_id(repo_id)  # its error is a ValueError that names the id
    api = api or HfApi()
    wanted = [*manifest.files, MANIFEST]
    try:
        repo = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        repo_id = getattr(repo, "repo_id", repo_id)  # with the owner
        print(f"hub: pushing {len(wanted)} files to {repo_id}", flush=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=str(directory),
            commit_message=f"{manifest.kind} {manifest.digest}",
            delete_patterns="*",
        )
        revision = commit.oid
        there = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, repo_type="model", revision=revision, recursive=True)
            if hasattr(entry, "blob_id")  # a file, not a folder
        }
    except LocalTokenNotFoundError as error:
        raise ValueError("the Hub needs a token: set HF_TOKEN or run `hf auth login`") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(
                f"the Hub refuses to write to {repo_id} ({status}): set HF_TOKEN to a token that may write there"
            ) from error
        raise
    for name in wanted:
        if name not in there:
            raise ValueError(f"{repo_id} lacks {name} after the push; run it again")
        size = (directory / name).stat().st_size
        if there[name].size != size:
            raise ValueError(f"{repo_id} holds {there[name].size} bytes of {name}, not {size}; run it again")
        lfs = getattr(there[name], "lfs", None)  # only large files have a SHA-256 there
        if lfs is not None and name in manifest.files and lfs.sha256 != manifest.files[name]:
            raise ValueError(f"{repo_id} holds another {name} than was pushed: SHA-256 {lfs.sha256}")
    return {
        "repo_id": repo_id,
        "url": f"https://huggingface.co/{repo_id}",
        "commit": revision,
        "files": len(wanted),
        "digest": manifest.digest,
    }
