"""Finds the artifacts that had a record: `python -m tasks.trace --used-by RECORD HOME`.

A part has a record if one of its tables with a column record_id lists it: a selection, latents, or a ledger, which also
lists rejected records. An index has a record if one of its parts has, and so has everything made from an artifact that
has it. Nothing is verified.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from model import storage
from tasks import hub_directory, sealed
from tasks.manifest import KINDS, Manifest, visible
from tasks.store import INDEX

# Kinds whose tables are complete: a child of a curated directory that is one of these has the record only if its own parts do.
NAMED_BY = ("record_id", "key", "locator", "file")  # columns of a table that name a record
LISTED = ("scores", "captions", "decisions", "selections", "curated", "latents")


class Artifact(NamedTuple):
    uri: str
    manifest: Manifest


class RecordUse(NamedTuple):
    """An artifact, and how it uses the record. `has` is False if the record was left out."""

    kind: str
    digest: str
    uri: str
    has: bool
    why: str


def used_by(record: str, home: str) -> list[RecordUse]:
    """Artifacts below HOME/artifacts that had a record or left it out, in the order of `KINDS`.

    Args:
        record: its id, the SHA-256 of the image's bytes, or its key.

    Raises:
        ValueError: there are no artifacts.
    """
    return uses_of([record], [home])[record]


def uses_of(records: Collection[str], homes: Sequence[str]) -> dict[str, list[RecordUse]]:
    """Like `used_by` for many records, reading each table once: record -> uses.

    Args:
        records: ids, keys, or files and URLs as in ledgers.
        homes: directories or URIs with artifacts/, with published pipelines (versions/), or sealed directories, also of
            the Hub (hf://OWNER/NAME). What was pushed to the Hub is named there and where else it is.

    Raises:
        ValueError: there are no artifacts, or the Hub has no such repository.
    """
    pushed = [_on_hub(home) for home in homes if hub_directory.is_hub(home)]
    stored = [artifact for home in homes if not hub_directory.is_hub(home) for artifact in _artifacts(home)]
    artifacts = {artifact.manifest.digest: artifact for artifact in [*pushed, *stored]}
    if not artifacts:
        raise ValueError(f"{' and '.join(homes)} has no artifacts/KIND/DIGEST with a manifest")
    direct: dict[str, dict[str, RecordUse]] = {record: {} for record in records}
    wanted = pa.array(sorted(set(records)), pa.string())
    for digest, (uri, manifest) in artifacts.items():
        for record, (has, why) in _in_tables(wanted, uri, manifest).items():
            direct[record][digest] = RecordUse(manifest.kind, digest, uri, has, why)
    parts = {
        digest: [part.digest for part in sealed.parts(uri) if part.digest]
        for digest, (uri, manifest) in artifacts.items()
        if INDEX in manifest.files and not hub_directory.is_hub(uri)
    }
    spread = {record: _spread(uses, artifacts, parts) for record, uses in direct.items()}
    return {record: [copy for use in uses for copy in _copies(use, pushed)] for record, uses in spread.items()}


def _on_hub(uri: str) -> Artifact:
    place = sealed.resolve(uri)
    return Artifact(place, sealed.load(place))


def _copies(use: RecordUse, pushed: Sequence[Artifact]) -> list[RecordUse]:
    """The use, and the same in each repository of the Hub."""
    places = [artifact.uri for artifact in pushed if artifact.manifest.digest == use.digest]
    return [use._replace(uri=uri) for uri in dict.fromkeys([use.uri, *places])]


def _spread(uses: dict[str, RecordUse], artifacts: dict[str, Artifact], parts: dict[str, list[str]]) -> list[RecordUse]:
    """Adds artifacts that were made from the artifacts that have the record."""
    left = set(artifacts) if uses else set()
    while left:  # each round adds the next generation
        new = {}
        for digest in left:
            uri, manifest = artifacts[digest]
            above = [part for part in parts.get(digest, ()) if part in uses and uses[part].has]
            if manifest.kind not in LISTED:
                above += [p.digest for p in manifest.parents if p.digest in uses and uses[p.digest].has]
            if above and not (digest in uses and uses[digest].has):
                source = uses[above[0]]
                new[digest] = RecordUse(manifest.kind, digest, uri, True, f"from {source.kind} {source.digest[:16]}")
        uses |= new
        left = left - new.keys() if new else set()
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(uses.values(), key=lambda use: (order.get(use.kind, 99), use.digest))


def _artifacts(home: str) -> Iterator[Artifact]:
    places = [storage.join(home, "artifacts", kind, "") for kind in KINDS] + [storage.join(home, sealed.VERSIONS, "")]
    for place in places:
        for uri in storage.children(place.rstrip("/")):
            if not uri.rpartition("/")[2].startswith("."):  # being written
                yield from _sealed(uri)
    yield from _sealed(home)


def _sealed(uri: str) -> Iterator[Artifact]:
    with contextlib.suppress(ValueError, OSError):  # not a manifest of this project
        yield Artifact(uri, sealed.load(uri))


def _in_tables(records: pa.Array, uri: str, manifest: Manifest) -> dict[str, tuple[bool, str]]:
    """Record -> (whether the directory has it, why), from the tables of one directory."""
    uses: dict[str, tuple[bool, str]] = {}
    if hub_directory.is_hub(uri):  # models, which have no tables of records
        return uses
    for name in sorted(name for name in manifest.files if name.endswith(".parquet")):
        with sealed.open_table(uri, name) as table:
            columns = [column for column in NAMED_BY if column in table.schema_arrow.names]
            if "record_id" not in columns:
                continue
            more = [column for column in ("kept", "rule") if column in table.schema_arrow.names]
            for batch in table.iter_batches(columns=columns + more):
                for column in columns:
                    for row in batch.filter(pc.is_in(batch[column], value_set=records)).to_pylist():
                        record = row[column]
                        if row.get("kept", True):
                            uses[record] = True, f"in {name}"
                        elif not uses.get(record, (False,))[0]:
                            uses[record] = False, f"left out by {row.get('rule') or 'a rule'}, in {name}"
    return uses


def main(record: str, home: str, as_json: bool = False) -> int:
    """Prints the uses; returns 0, or 1 if no artifact had the record."""
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


def _json(use: RecordUse) -> dict[str, Any]:
    return use._asdict()
