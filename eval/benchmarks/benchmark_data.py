"""Downloads the official prompt files (`Benchmark.source`) when they are needed, at the commit from which the rule was
taken.

This package contains none of them: licences differ (GenEval MIT, ELLA Apache-2.0, OneIG-Bench none stated, GenEval 2
CC BY-NC). Files that exist are not downloaded again.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from eval.benchmarks.base import Source
from eval.files import replacing

MAX_BYTES = 64 << 20
TIMEOUT_S = 60
Read = Callable[[str], bytes]


def default_folder() -> Path:
    """The folder of downloaded prompt files: NUCLEUS_HOME (default .nucleus)/benchmarks."""
    return Path(os.environ.get("NUCLEUS_HOME", ".nucleus")) / "benchmarks"


def download(source: Source, folder: str | Path | None = None, read: Read | None = None) -> Path:
    """The path for `Benchmark.prompts`, downloaded into `folder`/REPOSITORY-COMMIT unless it exists.

    Args:
        folder: see `default_folder`.
        read: content of a URL.

    Raises:
        ValueError: a file cannot be downloaded, or has another SHA-256 than the recorded one.
    """
    read = read or read_url
    place = Path(folder or default_folder()) / f"{source.repository.rpartition('/')[2]}-{source.commit[:12]}"
    for name, sha256 in source.files.items():
        path = place / name
        if path.is_file():
            _check(path.read_bytes(), sha256, str(path))
            continue
        url = f"https://raw.githubusercontent.com/{source.repository}/{source.commit}/{name}"
        try:
            content = read(url)
        except (OSError, urllib.error.URLError) as error:
            raise ValueError(
                f"the prompts of {source.repository} cannot be downloaded from {url} ({error}); download them elsewhere and set "
                f"prompts_file to {source.prompts or 'a checkout of the repository'}"
            ) from error
        _check(content, sha256, url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return place / source.prompts if source.prompts else place


def read_url(url: str) -> bytes:
    """
    Raises:
        OSError: it cannot be read, or has more than `MAX_BYTES`.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310  (https of a Source alone)
        content = answer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"more than {MAX_BYTES >> 20} MiB")
    return content


def _check(content: bytes, sha256: str | None, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{where} has the SHA-256 {digest}, and the benchmark's file has {sha256}: remove it")
