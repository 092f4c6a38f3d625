"""Checks the lineage of what is to be published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.manifest import load_manifest
from tasks.trace import Lineage


def check_ancestors(merged: Path, curated: Path, others: Sequence[Path]) -> None:
    """Refuses a model that could not be traced back to its records: before it is published, every ancestor must have its
    manifest, with the digest that its child names, and the weights must come from the given corpus.

    Reads manifests alone. The content of an ancestor may have been deleted, as long as its manifest is kept.

    Args:
        others: the remaining parents of the pipeline: components and scorecards.

    Raises:
        ValueError: names the ancestor that is gone or was replaced, or the corpus that the weights do not come from.
    """
    behind = Lineage(merged, check=False).nodes
    digest = load_manifest(curated).digest
    if digest not in behind:
        used = ", ".join(node.manifest.digest for node in behind.values() if node.manifest.kind == "curated") or "none"
        raise ValueError(
            f"curated={curated} has the digest {digest}, but {merged} was trained on other images (curated: {used}): give the "
            "corpus of the training"
        )
    for directory in (curated, *others):
        Lineage(directory, check=False)
