"""Record shards: WebDataset-style tars of `{key}.{ext}` (the original bytes) and `{key}.json` (captions, source, meta).

A shard is a function of its records: the same records give the same bytes, on any machine and day.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

RECORDS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("record_id", pa.string()),
        ("shard", pa.int32()),
        ("ext", pa.string()),
        ("num_bytes", pa.int64()),
        ("source", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("synthetic", pa.bool_()),
    ]
)


class Record(NamedTuple):
    """One image. `sidecar` is {"captions": [...], "source": "scenes|digits|user", "meta": {...}}; `ext` has no dot."""

    key: str
    data: bytes
    sidecar: dict[str, Any]
    ext: str

    def row(self, shard: int) -> dict[str, Any]:
        """The record's row of records.parquet. Its id is the SHA-256 of its bytes."""
        return {
            "key": self.key,
            "record_id": hashlib.sha256(self.data).hexdigest(),
            "shard": shard,
            "ext": self.ext,
            "num_bytes": len(self.data),
            "source": self.sidecar["source"],
            "captions": self.sidecar["captions"],
            "synthetic": self.sidecar["source"] == "scenes",
        }


def shard_name(shard: int) -> str:
    return f"shards/{shard:05d}.tar"


class ShardWriter:
    """Writes one shard; a context manager. Times, owners and modes are fixed, so that bytes depend on records only."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed by __exit__)

    def add(self, record: Record) -> None:
        assert "." not in record.key and "/" not in record.key, f"a key names tar members: {record.key!r}"
        assert record.ext and record.ext != "json" and "." not in record.ext, record.ext
        self._member(f"{record.key}.{record.ext}", record.data)
        self._member(f"{record.key}.json", json.dumps(record.sidecar, sort_keys=True).encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # mtime 0, mode 0644, uid 0
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()


def read_shard(path: str | os.PathLike) -> Iterator[Record]:
    """The records of one shard, in its order; one record is in memory at a time.

    Raises:
        ValueError: the file is no tar, or a record lacks its image or its sidecar.
    """
    if Path(path).stat().st_size % tarfile.RECORDSIZE:  # a tar cut between two members would just end
        raise ValueError(f"{path} is not a readable record shard: it was cut off")
    try:
        with tarfile.open(path, "r:") as tar:
            image: tuple[str, str, bytes] | None = None
            for member in tar:
                key, _, ext = member.name.partition(".")
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{path}: member {member.name!r} is no plain file")
                if ext != "json":
                    if image is not None:
                        raise ValueError(f"{path}: record {image[0]!r} has no sidecar {image[0]}.json")
                    image = (key, ext, file.read())
                    continue
                if image is None or image[0] != key:
                    raise ValueError(f"{path}: {member.name!r} does not follow its image")
                yield Record(key, image[2], json.loads(file.read()), image[1])
                image = None
            if image is not None:
                raise ValueError(f"{path}: record {image[0]!r} has no sidecar {image[0]}.json")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable record shard: {error}") from error


def read_records(directory: str | os.PathLike) -> Iterator[Record]:
    """The records of all shards of a records directory, shard by shard."""
    for path in sorted((Path(directory) / "shards").glob("*.tar")):
        yield from read_shard(path)
