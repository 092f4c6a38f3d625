"""Answers of judges in the store, so that no run asks a question that another run asked.

    STORE/answers/BUCKET.parquet    {"image", "question", "judge", "answer"}, the newest last

The key is that of eval.judging.answers. An image's answers are in the bucket of its digest's hash. A bucket is replaced as a
whole, so that a reader or a kill finds the old one or the new one; over `MAX_BYTES` its oldest answers are dropped. All
buckets together take at most 256 MiB. Writers on one machine take turns. In an object store, which has no lock, the last of two that
write a bucket at once wins. Answers that are lost in these ways, or by a damaged bucket, are asked again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval.judging.answers import COLUMNS, Key
from model import storage
from tasks import envs
from tasks.store import store

SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
MAX_BYTES = 2**20  # of each of the 256 buckets
WRITE_EVERY_S = 300.0
THREADS = 8  # requests at once to an object store


class StoredAnswers:
    """See eval.judging.answers.SharedAnswers. New answers are written every `WRITE_EVERY_S`, and at the end of the block, also if
    it ends with an error.

    A store that cannot be read or written stops no judge: `log` gets the reason.

    Args:
        conditions: what else may change an answer, such as how judges are shown an image; "" if nothing.
    """

    def __init__(self, conditions: str = "", log: Callable[[str], None] = print):
        self._folder = storage.join(store(), "answers")
        self._conditions, self._log = conditions, log
        self._waiting: dict[Key, Any] = {}
        self._written = time.monotonic()

    def find(self, keys: Collection[Key]) -> Mapping[Key, Any]:
        known: dict[Key, Any] = {}
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for answers in pool.map(self._find_in, *_columns(_by_bucket(keys))):
                    known |= answers
        except Exception as error:  # each kind of store raises its own types
            self._log(f"answers of other runs cannot be read: {type(error).__name__}: {error}")
        return known

    def add(self, rows: Iterable[tuple[Key, Any]]) -> None:
        self._waiting.update(rows)
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Writes the answers that were added since it last succeeded."""
        self._written = time.monotonic()
        if not self._waiting:
            return
        try:
            with self._turn(), ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(self._add_to, *_columns(_by_bucket(self._waiting))))
            self._waiting = {}
        except Exception as error:  # as above
            self._log(f"answers cannot be shared with other runs: {type(error).__name__}: {error}")

    def __enter__(self) -> StoredAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keeps other writers on this machine out of the folder until the block ends."""
        if storage.is_remote(self._folder):
            yield
            return
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        with open(Path(self._folder) / ".lock", "wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks, such as some NFS
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not release it: forked children have it too

    def _find_in(self, bucket: str, keys: Collection[Key]) -> dict[Key, Any]:
        answers = _answers_about(self._read(bucket), keys)
        known = {}
        for key in keys:
            text = answers.get(self._stored(key))
            with contextlib.suppress(ValueError):  # damaged
                if text is not None:
                    known[key] = json.loads(text)
        return known

    def _add_to(self, bucket: str, keys: Collection[Key]) -> None:
        table = self._read(bucket)
        answers = _answers_about(table, keys)
        new = [
            dict(zip(COLUMNS, (*self._stored(key), json.dumps(self._waiting[key], sort_keys=True)), strict=True))
            for key in keys
            if self._stored(key) not in answers
        ]
        if not new:
            return
        table = pa.concat_tables([table, pa.Table.from_pylist(new, SCHEMA)])
        while len(content := _content(table)) > MAX_BYTES:
            kept = int(0.9 * table.num_rows * MAX_BYTES / len(content))
            table = table.slice(table.num_rows - kept)
        storage.write_bytes(self._path(bucket), content)

    def _read(self, bucket: str) -> pa.Table:
        content = storage.read_bytes(self._path(bucket))
        if content is None:
            return SCHEMA.empty_table()
        try:
            return pq.read_table(pa.BufferReader(content), columns=list(COLUMNS)).cast(SCHEMA)
        except (pa.ArrowException, ValueError, OSError, KeyError) as error:
            self._log(f"{self._path(bucket)} is damaged, and its questions are asked again: {error}")
            return SCHEMA.empty_table()

    def _path(self, bucket: str) -> str:
        return storage.join(self._folder, f"{bucket}.parquet")

    def _stored(self, key: Key) -> Key:
        """The key in a bucket: newer code must not reuse the answers of older code, nor a judge those that it gave under other
        conditions."""
        image, question, revision = key
        return image, question, " ".join(filter(None, (envs.CACHE_VERSIONS["evaluation"], revision, self._conditions)))


def _by_bucket(keys: Iterable[Key]) -> dict[str, list[Key]]:
    buckets: dict[str, list[Key]] = {}
    for key in keys:
        buckets.setdefault(hashlib.sha256(key[0].encode()).hexdigest()[:2], []).append(key)
    return buckets


def _columns(buckets: Mapping[str, list[Key]]) -> tuple[list[str], list[list[Key]]]:
    return list(buckets), list(buckets.values())


def _answers_about(table: pa.Table, keys: Iterable[Key]) -> dict[Key, str]:
    """{stored key: answer as JSON} of the images of `keys`."""
    images = pa.array({key[0] for key in keys}, pa.string())
    rows = table.filter(pc.is_in(table["image"], value_set=images)).to_pylist()
    return {(row["image"], row["question"], row["judge"]): row["answer"] for row in rows}


def _content(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
