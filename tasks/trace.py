"""Traces a published pipeline back to its records: `python -m tasks.trace DIR_OR_URI [--expect DIGEST]`.

Follows the parents in each manifest and the parts of each index, reads and compares every file of every sealed
directory, in a local folder, in s3:// or on the Hub (hf://OWNER/NAME), and prints the tree with the digests of its
shards and the ids of its records. Exits 1, naming the file, if one byte differs.

    pipeline -> merged -> checkpoints x3 -> latents -> curated -> corpus -> records
             -> scorecard -> images -> ...

A repository of the Hub has no locations, only digests: --home or NUCLEUS_STORE names the store of its parents.

Seals prove that nothing changed, not who made it: --expect compares with a digest from another channel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import storage
from tasks import hub_directory, sealed
from tasks.manifest import KINDS, MANIFEST, Manifest, Parent, visible
from tasks.store import INDEX, Part

SHARD_SUFFIXES = (".tar", ".safetensors", ".distcp")
NEEDED = {  # kind -> kinds of its required parents
    "pipeline": ("merged", "components", "scorecard", "curated"),
    "curated": ("corpus",),
}
ID_BITS = (1 << 64) - 1


@dataclass
class Node:
    """A sealed directory in the lineage, at a path or URI. `parents` has digests, keys of the lineage's nodes."""

    uri: str
    manifest: Manifest
    parents: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)  # of a checked index: name -> digest

    @property
    def path(self) -> Path:
        """The path of a local directory."""
        assert not storage.is_remote(self.uri), self.uri
        return Path(self.uri)

    @property
    def shards(self) -> dict[str, str]:
        """Path inside the directory -> SHA-256, for files with data rather than tables about it."""
        return {name: digest for name, digest in self.manifest.files.items() if name.endswith(SHARD_SUFFIXES)}


class Lineage:
    """A sealed directory and all of its ancestors.

    nodes: digest -> node, the directory itself first, parents after their children.

    Args and errors: see `walk`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        home: str | os.PathLike | None = None,
        check: bool = True,
        expect: str | None = None,
    ) -> None:
        uri = sealed.resolve(directory)
        read: Callable[..., Manifest] = sealed.check if check else (lambda uri, *_: sealed.load(uri))
        first = read(uri, None, expect)
        self.nodes: dict[str, Node] = {}
        self._search = _Search(uri, home)
        self._parts: set[str] = set()
        todo = [(uri, first)]
        while todo:
            uri, manifest = todo.pop(0)
            if manifest.digest in self.nodes:
                continue
            node = self.nodes[manifest.digest] = Node(uri, manifest, [parent.digest for parent in manifest.parents])
            if check:
                _check_needed(node)
                for part in self.parts(node):
                    node.parts[part.name] = part.digest
                    self._check_part(part.as_parent(), uri)
            for parent in manifest.parents:
                if parent.digest not in self.nodes:
                    parent_uri = self._search.find(parent, uri)
                    todo.append((parent_uri, read(parent_uri, parent.kind, parent.digest)))

    def parts(self, node: Node) -> Iterator[Part]:
        """The parts of an index that could be made; empty if the node is not an index."""
        if INDEX in node.manifest.files:
            yield from (part for part in sealed.parts(node.uri) if part.digest)

    def find_part(self, part: Part, node: Node) -> str:
        """The path or URI of a part of a node."""
        return self._search.find(part.as_parent(), node.uri)

    def _check_part(self, part: Parent, child: str) -> None:
        if part.digest not in self._parts:
            self._parts.add(part.digest)
            location = self._search.find(part, child)
            for parent in sealed.check(location, part.kind, part.digest).parents:
                self._check_part(parent, location)

    def of_kind(self, kind: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.manifest.kind == kind]

    def records(self) -> Iterator[tuple[str, str]]:
        """(key, record id) of every curated record, in the order of the corpus."""
        for node in self.of_kind("curated"):
            for part in self.parts(node):
                yield from _columns(self.find_part(part, node), "selection.parquet", ("key", "record_id"))


def walk(directory: str | os.PathLike, home: str | os.PathLike | None = None, check: bool = True) -> dict[str, Node]:
    """The lineage of a sealed directory: digest -> node, the directory itself first, parents after their children.

    Args:
        directory: any sealed directory, or its URI.
        home: a local directory or URI in which to search, by digest, for parents and parts that are not at their
            recorded location. Default: the directories next to `directory`, NUCLEUS_HOME and NUCLEUS_STORE.
        check: read and compare every file and part; otherwise only manifests are read, and parts not at all.

    Raises:
        ValueError: names the file that was changed, added or lost, the parent that is missing, or the one that a
            manifest should name.
    """
    return Lineage(directory, home, check).nodes


def _check_needed(node: Node) -> None:
    named = {parent.kind for parent in node.manifest.parents}
    for kind in NEEDED.get(node.manifest.kind, ()):
        if kind not in named:
            raise ValueError(f"{node.uri} is a {node.manifest.kind} whose manifest names no {kind}: it has no lineage")


class _Search:
    """Finds parents at their recorded location, or else by digest. Local folders are listed once, when needed; in an
    object store only the paths of artifacts are tried, since listing a large store takes hours."""

    def __init__(self, uri: str, home: str | os.PathLike | None) -> None:
        if home is not None:
            home = storage.check_path(home)
            if not storage.is_remote(home) and not Path(home).is_dir():
                raise ValueError(f"--home {home} is not a directory")
            self.roots = [home]
        else:
            self.roots = [_above(uri), os.environ.get("NUCLEUS_HOME", ".nucleus"), os.environ.get("NUCLEUS_STORE", "")]
            self.roots = [root for root in dict.fromkeys(self.roots) if root]
        self.by_digest: dict[str, str] | None = None

    def find(self, parent: Parent, child: str | os.PathLike) -> str:
        recorded = _allowed(parent.uri)
        there = sealed.digest_at(recorded) if recorded else None
        if recorded and there == parent.digest:
            return recorded
        kept = [(root, step) for root in self.roots for step in ("artifacts/", "", "versions/")]
        for root, step in kept:
            place = storage.join(
                root, f"{step}{parent.digest}" if step == "versions/" else f"{step}{parent.kind}/{parent.digest}"
            )
            if sealed.digest_at(place) == parent.digest:
                return place
        if self.by_digest is None:
            self.by_digest = dict(self._local())
        if parent.digest in self.by_digest:
            return self.by_digest[parent.digest]
        if there is not None:
            sealed.check(recorded)  # the manifest has a digest that was changed by hand
        now = f"which now holds the digest {there}" if there else "which is gone"
        raise ValueError(
            f"{child} was made from {parent.kind} {parent.digest}, recorded at {parent.uri or 'no place'}, {now}; no "
            f"directory of that digest is under {' or '.join(map(str, self.roots))} (see --home)"
        )

    def _local(self) -> Iterator[tuple[str, str]]:
        for root in self.roots:
            if storage.is_remote(root):
                continue
            for folder, names, files in os.walk(root):
                if MANIFEST in files:
                    names.clear()  # a sealed directory contains no other
                    digest = sealed.digest_at(folder)
                    if digest is not None:  # otherwise it is not a sealed directory, or damaged
                        yield digest, folder
                names[:] = sorted(name for name in names if not name.startswith("."))  # being written


def _above(uri: str) -> str:
    """The folder of an artifact's siblings: HOME/artifacts for HOME/artifacts/KIND/DIGEST. The Hub has none."""
    if hub_directory.is_hub(uri):
        return ""
    if storage.is_remote(uri):
        above = uri.rpartition("/")[0]
        return above.removesuffix("/artifacts") if above.rpartition("/")[2] not in KINDS else above.rpartition("/")[0]
    parent = Path(uri).resolve().parent
    return str(parent.parent if parent.name in KINDS else parent)


def _allowed(uri: str) -> str:
    """A recorded path or URI; "" if it is missing or may not be opened."""
    try:
        return storage.check_path(uri)
    except ValueError:
        return ""


def trace(
    directory: str | os.PathLike, home: str | os.PathLike | None = None, expect: str | None = None
) -> dict[str, Any]:
    """Verifies the whole lineage and describes it as a JSON-able dict.

    Args:
        expect: the required digest of the directory.

    Returns:
        see `describe`.

    Raises:
        ValueError: as `walk`; or a record is used but was not kept, or kept but not in the ledger.
    """
    return describe(Lineage(directory, home, expect=expect))


def describe(lineage: Lineage) -> dict[str, Any]:
    """
    Returns:
        {"root": digest, "nodes": [{"kind", "digest", "path", "counts", "files", "bytes", "made_by", "parents": [digest],
        "shards": {name: SHA-256}, "parts": {name: digest}}], "records": {"input", "kept", "used"}}.
        `input` counts the lines of the ledgers, `kept` the curated records, `used` those with a latent in any stage.

    Raises:
        ValueError: a record that is used but was not kept, or kept but is not in the ledger.
    """
    described = [
        {
            "kind": node.manifest.kind,
            "digest": digest,
            "path": node.uri,
            "counts": dict(node.manifest.counts),
            "files": len(node.manifest.files),
            "bytes": sum(size for name, size in sealed.sizes(node.uri).items() if name in node.manifest.files),
            "made_by": dict(node.manifest.made_by),
            "parents": node.parents,
            "shards": node.shards,
            "parts": node.parts,
        }
        for digest, node in lineage.nodes.items()
    ]
    return {"root": next(iter(lineage.nodes)), "nodes": described, "records": _count_records(lineage)}


def _count_records(lineage: Lineage) -> dict[str, int]:
    """Counts records, and checks that each latent belongs to a curated record, and each curated record is in the
    ledger. Only one shard's ids are in memory at a time: a corpus may have hundreds of millions."""
    ledger: dict[str, list[int]] = {}  # shard -> kept records of the ledger, and the sum of their ids
    lines = 0
    selections: dict[str, list[str]] = {}
    for node in lineage.of_kind("curated"):
        for shard, kept, record_id in _columns(node.uri, "ledger.parquet", ("shard", "kept", "record_id")):
            lines += 1
            if kept:
                total = ledger.setdefault(shard, [0, 0])
                total[0], total[1] = total[0] + 1, (total[1] + int(record_id[:16], 16)) & ID_BITS
        for part in lineage.parts(node):
            selections.setdefault(part.name, []).append(lineage.find_part(part, node))
    latents: dict[str, list[str]] = {}
    for node in lineage.of_kind("latents"):
        for part in lineage.parts(node):
            latents.setdefault(part.name, []).append(lineage.find_part(part, node))
    kept_records = used_records = 0
    for shard in sorted(ledger.keys() | selections.keys() | latents.keys()):
        kept_ids = _ids(selections.get(shard, []), "selection.parquet")
        total = [len(kept_ids), sum(int(record_id[:16], 16) for record_id in kept_ids) & ID_BITS]
        if total != ledger.get(shard, [0, 0]):
            raise ValueError(_difference(lineage, shard, kept_ids))
        used_ids = _ids(latents.get(shard, []), "rows.parquet")
        lost = sorted(used_ids - kept_ids) if lineage.of_kind("curated") else []
        if lost:
            raise ValueError(
                f"the latents of shard {shard} have record {lost[0]} ({len(lost)} in all), which was not kept"
            )
        kept_records += len(kept_ids)
        used_records += len(used_ids)
    return {"input": lines, "kept": kept_records, "used": used_records}


def _difference(lineage: Lineage, shard: str, selected: set[str]) -> str:
    """A message that names a record of one shard that only the ledger or only the selection keeps."""
    kept: set[str] = set()
    for node in lineage.of_kind("curated"):
        lines = _columns(node.uri, "ledger.parquet", ("shard", "kept", "record_id"))
        kept |= {record_id for name, is_kept, record_id in lines if is_kept and name == shard}
    for ids, has, lacks in ((selected - kept, "selection", "ledger"), (kept - selected, "ledger", "selection")):
        if ids:
            return f"the {has} of shard {shard} keeps record {min(ids)} ({len(ids)} in all), which the {lacks} does not"
    return f"the ledger keeps a record of shard {shard} twice"


def _ids(places: list[str], table: str) -> set[str]:
    return {record_id for place in places for (record_id,) in _columns(place, table, ("record_id",))}


def _columns(uri: str, table: str, names: tuple[str, ...]) -> Iterator[tuple]:
    """The rows of some columns of a table.

    Raises:
        ValueError: the table is missing, or lacks one of them.
    """
    try:
        with sealed.open_table(uri, table) as file:
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                raise ValueError(f"{uri}/{table} has no column {missing[0]}")
            for batch in file.iter_batches(columns=list(names)):
                columns = batch.to_pydict()
                yield from zip(*(columns[name] for name in names))
    except FileNotFoundError as error:
        raise ValueError(f"{uri} has no {table}") from error


def lineage_rows(directories: list[str | os.PathLike]) -> list[dict[str, Any]]:
    """Some sealed directories and their ancestors, as rows of a table: kind, digest, counts, code version.

    Nothing is verified. A lost ancestor is still listed, with the digest in its child.
    """
    rows: dict[str, dict[str, Any]] = {}
    paths = [str(directory) for directory in directories if (Path(directory) / MANIFEST).is_file()]
    todo = [(path, sealed.load(path)) for path in paths]
    search: _Search | None = None
    while todo:
        path, manifest = todo.pop(0)
        rows[manifest.digest] = {
            "kind": manifest.kind,
            "digest": manifest.digest,
            "counts": dict(manifest.counts),
            "code_version": manifest.made_by.get("code_version", ""),
        }
        search = search or _Search(path, None)
        for parent in manifest.parents:
            if parent.digest in rows:
                continue
            rows[parent.digest] = {"kind": parent.kind, "digest": parent.digest, "counts": {}, "code_version": ""}
            try:
                location = search.find(parent, path)
                todo.append((location, sealed.load(location)))
            except ValueError:
                continue
    order = {kind: i for i, kind in enumerate(reversed(KINDS))}
    return sorted(rows.values(), key=lambda row: (order.get(row["kind"], 99), row["digest"]))


def render(story: dict[str, Any]) -> str:
    """The lineage as a tree of text; a directory that several others share is printed once. Control characters are
    escaped."""
    nodes = {node["digest"]: node for node in story["nodes"]}
    lines: list[str] = []
    shown: set[str] = set()

    def show(digest: str, depth: int) -> None:
        node, pad = nodes[digest], "  " * depth
        counts = "".join(f", {value} {name}" for name, value in node["counts"].items())
        if digest in shown:
            lines.append(f"{pad}{node['kind']} {digest} (see above)")
            return
        shown.add(digest)
        lines.append(f"{pad}{node['kind']} {digest}: {node['files']} files, {node['bytes']:,} bytes{counts}")
        made_by = ", ".join(f"{name} {value}" for name, value in node["made_by"].items())
        lines.append(f"{pad}  at {node['path']}, by {made_by}")
        lines.extend(f"{pad}  shard {name} {sha}" for name, sha in sorted(node["shards"].items()))
        lines.extend(f"{pad}  part {name} {part}" for name, part in node["parts"].items())
        for parent in node["parents"]:
            show(parent, depth + 1)

    show(story["root"], 0)
    kinds = Counter(node["kind"] for node in story["nodes"])
    files, shards, parts = (
        sum(node["files"] for node in story["nodes"]),
        sum(len(node["shards"]) for node in story["nodes"]),
        sum(len(node["parts"]) for node in story["nodes"]),
    )
    records = story["records"]
    what = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    lines.append("")
    lines.append(f"verified {files} files ({shards} shards) in {what}, and {parts} parts")
    lines.append(f"records: {records['input']} in the ledger, {records['kept']} kept, {records['used']} with latents")
    return "\n".join(visible(line) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.trace", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "directory",
        nargs="?",
        help="a sealed directory, its s3:// URI, or hf://OWNER/NAME: such as a published pipeline",
    )
    parser.add_argument("--home", help="where to look for parents that moved, by their digest: a directory or a URI")
    parser.add_argument("--expect", metavar="DIGEST", help="the digest that it must have, from another channel")
    parser.add_argument("--html", metavar="OUT", help="draw the lineage into this file")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--records", action="store_true", help="list the key and id of every record behind it")
    output.add_argument("--json", action="store_true", help="the lineage as JSON, without the records' ids")
    parser.add_argument(
        "--used-by",
        nargs=2,
        metavar=("RECORD", "HOME"),
        help="instead of a directory: name every artifact in HOME (a directory or a URI) that had a record, by its id "
        "(the SHA-256 of the image's bytes) or its key",
    )
    options = parser.parse_args(arguments)
    if (options.directory is None) == (options.used_by is None):
        parser.error("give a directory, or --used-by RECORD HOME")
    try:
        if options.used_by:
            from tasks.lineage.record_usage import main as used_by

            return used_by(*options.used_by, as_json=options.json)
        lineage = Lineage(options.directory, options.home, expect=options.expect)
        story = describe(lineage)
        if options.html:
            from tasks.lineage.trace_page import trace_page

            storage.write_bytes(options.html, trace_page(story).encode())
        print(json.dumps(story, indent=1) if options.json else render(story), flush=True)
        if options.records:
            for key, record_id in lineage.records():
                print(visible(f"  {key} {record_id}"))
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"LINEAGE BROKEN: {visible(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
