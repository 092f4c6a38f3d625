"""From a published pipeline back to the records behind it: `python -m tasks.trace DIR [--home DIR]`.

Walks the parents that each manifest names, reads every file of every sealed directory on the way again, and
prints the tree with the digests of its shards and the ids of its records. Exits 1, naming the file, when one
byte differs anywhere.

    pipeline -> merged -> checkpoints x3 -> latents -> curated -> records
             -> scorecard -> images -> ...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.manifest import KINDS, MANIFEST, Manifest, Parent, load_manifest, verify
from tasks.store import fetch_part, is_index, read_index

SHARD_SUFFIXES = (".tar", ".safetensors", ".distcp")


@dataclass
class Node:
    """A sealed directory in the lineage. `parents` holds digests, keys of the lineage's nodes."""

    path: Path
    manifest: Manifest
    parents: list[str] = field(default_factory=list)

    @property
    def shards(self) -> dict[str, str]:
        """Path inside the directory -> SHA-256, of the files that hold data rather than tables about it."""
        return {name: digest for name, digest in self.manifest.files.items() if name.endswith(SHARD_SUFFIXES)}


def walk(directory: str | os.PathLike, home: str | os.PathLike | None = None, check: bool = True) -> dict[str, Node]:
    """The lineage of a sealed directory: digest -> node, the directory itself first, parents after their children.

    Args:
        directory: any sealed directory.
        home: where to look for parents that are not where the manifest says, by their digest. Default: the
            directories beside `directory`, and NUCLEUS_HOME.
        check: read every file again and compare; otherwise only the manifests are read.

    Raises:
        ValueError: naming the file that was changed, added or lost, or the parent that is nowhere.
    """
    directory = Path(directory)
    read = verify if check else load_manifest
    first = read(directory)
    nodes: dict[str, Node] = {}
    search = _Search(directory, home)
    todo = [(directory, first)]
    while todo:
        path, manifest = todo.pop(0)
        if manifest.digest in nodes:
            continue
        nodes[manifest.digest] = Node(path, manifest, [parent.digest for parent in manifest.parents])
        for parent in manifest.parents:
            if parent.digest not in nodes:
                found = search.find(parent, path)
                todo.append((found, read(found)))
    return nodes


class _Search:
    """Finds parents where they were recorded, or else by digest. The directories are listed once, when needed."""

    def __init__(self, directory: Path, home: str | os.PathLike | None) -> None:
        if home is not None and not Path(home).is_dir():
            raise ValueError(f"--home {home} is not a directory")
        beside = directory.resolve().parent
        beside = beside.parent if beside.name in KINDS else beside  # artifacts lie in HOME/artifacts/KIND/DIGEST
        self.roots = [Path(home)] if home is not None else [beside, Path(os.environ.get("NUCLEUS_HOME", ".nucleus"))]
        self.by_digest: dict[str, Path] | None = None

    def find(self, parent: Parent, child: Path) -> Path:
        recorded = Path(parent.uri)
        there = load_manifest(recorded) if (recorded / MANIFEST).is_file() else None
        if there is not None and there.digest == parent.digest:
            return recorded
        if self.by_digest is None:
            self.by_digest = dict(self._sealed())
        if parent.digest in self.by_digest:
            return self.by_digest[parent.digest]
        if there is not None:
            verify(recorded)  # a changed digest names itself here
        now = f"which now holds {there.kind} {there.digest}" if there else "which is gone"
        raise ValueError(
            f"{child} was made from {parent.kind} {parent.digest}, recorded at {recorded}, {now}; no directory of "
            f"that digest lies under {' or '.join(str(root) for root in self.roots)} (see --home)"
        )

    def _sealed(self) -> Iterator[tuple[str, Path]]:
        for root in self.roots:
            for folder, names, files in os.walk(root):
                if MANIFEST in files:
                    names.clear()  # a sealed directory holds no other
                    try:
                        yield load_manifest(folder).digest, Path(folder)
                    except ValueError:
                        continue  # not one of ours, or damaged: then it is not the one that we look for
                names[:] = sorted(name for name in names if not name.startswith(".writing-"))


def trace(directory: str | os.PathLike, home: str | os.PathLike | None = None) -> dict[str, Any]:
    """Verifies the whole lineage, and tells it as a JSON-able dict.

    Returns:
        {"root": digest, "nodes": [{"kind", "digest", "path", "counts", "files", "bytes", "made_by",
        "parents": [digest], "shards": {name: SHA-256}}], "records": {"input", "kept", "used", "ids": {key: record id}}}.
        `input` counts the raw records, `kept` the curated ones, `used` those with a latent.

    Raises:
        ValueError: as `walk`; or a record that is used but was not kept, or kept but was not in the input.
    """
    nodes = walk(directory, home)
    described = [
        {
            "kind": node.manifest.kind,
            "digest": digest,
            "path": str(node.path),
            "counts": dict(node.manifest.counts),
            "files": len(node.manifest.files),
            "bytes": sum((node.path / name).stat().st_size for name in node.manifest.files),
            "made_by": dict(node.manifest.made_by),
            "parents": node.parents,
            "shards": node.shards,
        }
        for digest, node in nodes.items()
    ]
    return {"root": next(iter(nodes)), "nodes": described, "records": _records(nodes)}


def _records(nodes: dict[str, Node]) -> dict[str, Any]:
    """The records behind it, as the tables tell; each table's ids must be among those of the table before it."""
    raw = _ids(nodes, "records", "records.parquet")
    kept = _ids(nodes, "curated", "records.parquet") | _ids(nodes, "curated", "selection.parquet")
    ledger = _ids(nodes, "curated", "ledger.parquet")
    used = _ids(nodes, "latents", "index.parquet", key=None) | _ids(nodes, "latents", "rows.parquet", key=None)
    for name, ids, source_name, source in (
        ("the curated records", kept, "the ledger", ledger),
        ("the ledger", ledger, "the raw records", raw),
        ("the latents", used, "the curated records", kept),
    ):
        known = {record_id for _, record_id in source}
        lost = sorted({record_id for _, record_id in ids} - known) if source else []
        if lost:
            raise ValueError(f"{name} hold record {lost[0]} ({len(lost)} in all), which {source_name} do not have")
    behind = kept or ledger or raw
    return {
        "input": len(raw) or len(ledger),
        "kept": len(kept),
        "used": len({record_id for _, record_id in used}),
        "ids": dict(sorted(behind)),
    }


def _ids(nodes: dict[str, Node], kind: str, table: str, key: str | None = "key") -> set[tuple[str, str]]:
    """(key, record id) over every directory of a kind that holds the table."""
    import pyarrow.parquet as pq

    found: set[tuple[str, str]] = set()
    for node in nodes.values():
        for path in _tables(node, table) if node.manifest.kind == kind else ():
            names = pq.read_schema(path).names
            columns = [name for name in (key, "record_id") if name]
            if "record_id" not in names or (key and key not in names):
                raise ValueError(f"{path} lacks the columns {', '.join(columns)}; it has {', '.join(names)}")
            data = pq.read_table(path, columns=columns).to_pydict()
            found.update(zip(data[key] if key else data["record_id"], data["record_id"]))
    return found


def _tables(node: Node, table: str) -> Iterator[Path]:
    """The table in a directory, or in each part of an index, which is read again and verified."""
    if table in node.manifest.files:
        yield node.path / table
    elif is_index(node.path):
        for part in read_index(node.path):
            path = fetch_part(part) / table if part.digest else None
            if path is not None and path.is_file():
                yield path


def lineage_rows(directories: list[str | os.PathLike]) -> list[dict[str, Any]]:
    """The ancestors of some sealed directories, themselves first, for a table: kind, digest, counts, code version.

    Nothing is verified. An ancestor that cannot be found any more is still named, by the digest in its child.
    """
    rows: dict[str, dict[str, Any]] = {}
    todo = [Path(directory) for directory in directories if (Path(directory) / MANIFEST).is_file()]
    search: _Search | None = None
    while todo:
        path = todo.pop(0)
        manifest = load_manifest(path)
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
                todo.append(search.find(parent, path))
            except ValueError:
                continue
    order = {kind: i for i, kind in enumerate(reversed(KINDS))}
    return sorted(rows.values(), key=lambda row: (order.get(row["kind"], 99), row["digest"]))


def render(story: dict[str, Any], list_records: bool = False) -> str:
    """The lineage as a tree to read; a directory that several others share is spelled out once."""
    nodes = {node["digest"]: node for node in story["nodes"]}
    lines: list[str] = []
    told: set[str] = set()

    def tell(digest: str, depth: int) -> None:
        node, pad = nodes[digest], "  " * depth
        counts = "".join(f", {value} {name}" for name, value in node["counts"].items())
        if digest in told:
            lines.append(f"{pad}{node['kind']} {digest} (see above)")
            return
        told.add(digest)
        lines.append(f"{pad}{node['kind']} {digest}: {node['files']} files, {node['bytes']:,} bytes{counts}")
        lines.append(
            f"{pad}  at {node['path']}, by {', '.join(f'{name} {value}' for name, value in node['made_by'].items())}"
        )
        lines.extend(f"{pad}  shard {name} {sha}" for name, sha in sorted(node["shards"].items()))
        for parent in node["parents"]:
            tell(parent, depth + 1)

    tell(story["root"], 0)
    kinds = Counter(node["kind"] for node in story["nodes"])
    files = sum(node["files"] for node in story["nodes"])
    shards = sum(len(node["shards"]) for node in story["nodes"])
    records = story["records"]
    lines.append("")
    lines.append(f"verified {files} files ({shards} shards) in {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    lines.append(f"records: {records['input']} raw, {records['kept']} kept, {records['used']} with latents")
    ids = list(records["ids"].items())
    shown = ids if list_records else ids[:3]
    lines.extend(f"  {key} {record_id}" for key, record_id in shown)
    if len(shown) < len(ids):
        lines.append(f"  and {len(ids) - len(shown)} more (--records lists them)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.trace", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", help="a sealed directory, such as a published pipeline")
    parser.add_argument("--home", help="where to look for parents that moved, by their digest")
    parser.add_argument("--records", action="store_true", help="list the id of every record behind it")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    options = parser.parse_args(arguments)
    try:
        story = trace(options.directory, options.home)
    except (ValueError, OSError) as error:
        print(f"LINEAGE BROKEN: {error}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(story, indent=1) if options.json else render(story, options.records), flush=True)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
