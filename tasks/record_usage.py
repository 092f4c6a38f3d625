"""Which artifacts had a record: `python -m tasks.trace --used-by RECORD HOME`.

Tables with a column record_id say it of parts: a selection, latents, and ledgers, which also list what was left out. An index
has a record if one of its parts has; what is made from an artifact that has it, has it too. Nothing is verified.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.compute as pc

from model import storage
from tasks import sealed
from tasks.manifest import KINDS, Manifest, visible
from tasks.store import INDEX

# Kinds whose tables are complete: a child of a curated directory that is one of these has the record only if its own parts do.
LISTED = ("scores", "captions", "decisions", "selections", "curated", "latents")


class Artifact(NamedTuple):
    uri: str
    manifest: Manifest


class Use(NamedTuple):
    """An artifact, and what it has to do with the record. `has` is False where the record was left out."""

    kind: str
    digest: str
    uri: str
    has: bool
    why: str


def used_by(record: str, home: str) -> list[Use]:
    """Every artifact below HOME/artifacts that had a record, and those that left it out, in the order of `KINDS`.

    Args:
        record: its id, the SHA-256 of the image's bytes, or its key.

    Raises:
        ValueError: there are no artifacts.
    """
    artifacts = {artifact.manifest.digest: artifact for artifact in _artifacts(home)}
    if not artifacts:
        raise ValueError(f"{home} has no artifacts/KIND/DIGEST with a manifest")
    uses: dict[str, Use] = {}
    for digest, (uri, manifest) in artifacts.items():
        direct = _in_tables(record, uri, manifest)
        if direct is not None:
            uses[digest] = Use(manifest.kind, digest, uri, *direct)
    parts = {
        digest: [part.digest for part in sealed.parts(uri) if part.digest]
        for digest, (uri, manifest) in artifacts.items()
        if INDEX in manifest.files
    }
    left = set(artifacts)
    while left:  # each round reaches the next generation
        new = {}
        for digest in left:
            uri, manifest = artifacts[digest]
            above = [part for part in parts.get(digest, ()) if part in uses and uses[part].has]
            if manifest.kind not in LISTED:
                above += [p.digest for p in manifest.parents if p.digest in uses and uses[p.digest].has]
            if above and not (digest in uses and uses[digest].has):
                source = uses[above[0]]
                new[digest] = Use(manifest.kind, digest, uri, True, f"from {source.kind} {source.digest[:16]}")
        uses |= new
        left = left - new.keys() if new else set()
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(uses.values(), key=lambda use: (order.get(use.kind, 99), use.digest))


def _artifacts(home: str) -> Iterator[Artifact]:
    for kind in KINDS:
        for uri in storage.children(storage.join(home, "artifacts", kind)):
            if uri.rpartition("/")[2].startswith("."):
                continue  # being written
            try:
                yield Artifact(uri, sealed.load(uri))
            except (ValueError, OSError):
                continue  # not one of ours


def _in_tables(record: str, uri: str, manifest: Manifest) -> tuple[bool, str] | None:
    """(whether it has the record, why) by the tables of one directory; None where none lists it."""
    found: tuple[bool, str] | None = None
    for name in sorted(name for name in manifest.files if name.endswith(".parquet")):
        with sealed.open_table(uri, name) as table:
            columns = [column for column in ("record_id", "key") if column in table.schema_arrow.names]
            if "record_id" not in columns:
                continue
            more = [column for column in ("kept", "rule") if column in table.schema_arrow.names]
            for batch in table.iter_batches(columns=columns + more):
                match = pc.equal(batch["record_id"], record)
                if "key" in columns:
                    match = pc.or_(match, pc.equal(batch["key"], record))
                for row in batch.filter(match).to_pylist():
                    if row.get("kept", True):
                        return True, f"in {name}"
                    found = False, f"left out by {row.get('rule') or 'a rule'}, in {name}"
    return found


def main(record: str, home: str, as_json: bool = False) -> int:
    """Prints the uses; returns 0, or 1 where no artifact had the record."""
    uses = used_by(record, storage.check_path(home))
    if as_json:
        print(json.dumps([_json(use) for use in uses], indent=1))
    else:
        for use in uses:
            print(visible(f"{use.kind} {use.digest}: {use.why}, at {use.uri}"))
        has = sum(use.has for use in uses)
        published = sum(use.has and use.kind == "pipeline" for use in uses)
        print(
            visible(f"{record}: {has} artifacts had it, {published} of them pipelines; {len(uses) - has} left it out")
        )
    return 0 if any(use.has for use in uses) else 1


def _json(use: Use) -> dict[str, Any]:
    return use._asdict()
