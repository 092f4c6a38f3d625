"""Checks a source's path without reading it. tasks/curation/sources has the scan."""

from __future__ import annotations

from model import storage
from tasks.curation.sources.base import visible

PLACEHOLDER = "YOUR-BUCKET"  # in recipes without data


def check_source(path: str, local: bool) -> None:
    """Checks the form of a source's path or URI, without reading it.

    Raises:
        ValueError: the recipe's placeholder, a URI that `storage.check_path` refuses, or on a cluster a path of
            a user's own machine.
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


def check_takedown(path: str | None, local: bool) -> None:
    """Refuses, without reading it, a takedown list that the cluster cannot read.

    Raises:
        ValueError: on a cluster, a path of the user's machine.
    """
    if path and not storage.is_remote(path) and not local:
        raise ValueError(f"curation.takedown={visible(path)!r} is a path of your machine; give an s3:// URI")
