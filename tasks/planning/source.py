"""A digest of a user's own images, so that changing one of them reruns what depends on it."""

from __future__ import annotations

import tempfile

from model import storage
from tasks.curation.config import SourceConfig
from tasks.curation.sources.base import visible, write_corpus

PLACEHOLDER = "YOUR-BUCKET"  # in the recipes that come without data


def check_source(path: str, local: bool) -> None:
    """Refuses, without looking at it, what cannot be a source.

    Raises:
        ValueError: the recipe's placeholder, a URI that `storage.check_path` refuses, or on a cluster a path of
            somebody's machine.
    """
    if PLACEHOLDER in path:
        raise ValueError(
            f"source.path={path!r} is a placeholder: give your own images by --source, such as --source "
            "s3://BUCKET/images/, or set source.path"
        )
    if path and not storage.is_remote(storage.check_path(path)) and not local:
        raise ValueError(
            f"source {visible(path)!r} is a path of your machine, which the cluster cannot read; give an s3:// URI"
        )


def fingerprint(path: str, config: SourceConfig | None = None) -> str:
    """The digest of the corpus that a scan of `path` gives: of names and contents (checksums, when remote), not of the path.

    Raises:
        ValueError: what a scan can see to be wrong; see `write_corpus`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return write_corpus(config or SourceConfig(), path, scratch)["digest"]
