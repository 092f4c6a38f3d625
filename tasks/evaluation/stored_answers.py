"""Answers of judges in the store, so that no run asks a question that another run asked.

    STORE/answers/BUCKET.txt    a line for each answer: KEY ANSWER, the newest last

KEY is a digest of the key of eval.judging.answers, and ANSWER is JSON. An image's answers are in the bucket of its digest's
hash. A bucket is replaced as a whole, so that a reader or a kill finds the old one or the new one; over `MAX_BYTES` its oldest
answers are dropped. All buckets together take at most 256 MiB. They are not compressed: others may write there, too, and what
is read takes no more memory than the file. Writers on one machine take turns. In an object store, which has no lock, the last
of two that write a bucket at once wins. Answers that are lost in these ways, or by a damaged bucket, are asked again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eval.files import open_plain
from eval.judging.answers import Key
from model import storage
from tasks import envs
from tasks.manifest import visible
from tasks.store import store

MAX_BYTES = 2**20  # of each of the 256 buckets
MAX_FOUND_BYTES = 2**24  # of the answers that `find` returns; parsed, empty lists take 30 times as much
MAX_NESTED = 100  # deeper ones may be parsed here, and be too deep for Python's recursion where they are written
WRITE_EVERY_S = 300.0
LOCK_WAIT_S = 30.0
THREADS = 8  # requests at once to an object store
MAX_ERRORS = 16  # then `find` gives up: each request to a store that does not answer may take minutes


class StoredAnswers:
    """See eval.judging.answers.SharedAnswers. New answers are written every `WRITE_EVERY_S`, and at the end of the block, also if
    it ends with an error.

    A store that cannot be read or written stops no judge: `log` gets the reason.

    Args:
        conditions: what else may change an answer, such as how judges are shown an image; "" if nothing.
    """

    def __init__(self, conditions: str = "", log: Callable[[str], None] = print):
        self._folder = storage.join(store(), "answers")
        self._conditions = conditions
        self._log = lambda line: log(visible(line))
        self._waiting: dict[Key, Any] = {}
        self._rejected: set[Key] = set()
        self._written = time.monotonic()

    def find(self, keys: Collection[Key]) -> Mapping[Key, Any]:
        known: dict[Key, Any] = {}
        size, damaged = 0, 0
        errors: list[Exception] = []

        def found(bucket: str, keys: Collection[Key]) -> dict[Key, bytes]:
            if len(errors) >= MAX_ERRORS:
                return {}
            try:
                return self._newest(keys, self._read(bucket))
            except Exception as error:  # each kind of store raises its own types
                errors.append(error)
                return {}

        with ThreadPoolExecutor(THREADS) as pool:
            for answers in pool.map(found, *_columns(_by_bucket(keys))):
                for key, text in answers.items():
                    size += len(text)
                    if size > MAX_FOUND_BYTES:
                        break
                    try:
                        known[key] = _parsed(text)
                    except ValueError:
                        damaged += 1
        if errors:
            first = f"{type(errors[0]).__name__}: {errors[0]}"
            self._log(f"answers of other runs cannot be read: {first} (the first of {len(errors)} errors)")
        if size > MAX_FOUND_BYTES:
            self._log(f"answers in {self._folder} take over {MAX_FOUND_BYTES} bytes: the others are asked again")
        if damaged:
            self._log(f"{damaged} answers in {self._folder} are damaged, and their questions are asked again")
        return known

    def add(self, rows: Iterable[tuple[Key, Any]]) -> None:
        self._waiting.update(rows)
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.write()

    def reject(self, keys: Iterable[Key]) -> None:
        self._rejected.update(keys)

    def write(self) -> None:
        """Writes the answers that were added since it last succeeded."""
        self._written = time.monotonic()
        if not self._waiting:
            return
        try:
            with self._turn(), ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(self._add_to, *_columns(_by_bucket(self._waiting))))
            self._rejected -= self._waiting.keys()
            self._waiting = {}
        except Exception as error:  # as above
            self._log(f"answers cannot be shared with other runs: {type(error).__name__}: {error}")

    def __enter__(self) -> StoredAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keeps other writers on this machine out of the folder until the block ends, or for `LOCK_WAIT_S` tries to.

        Without the lock the last of two that write a bucket at once wins, as in an object store.
        """
        if storage.is_remote(self._folder):
            yield
            return
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _locked_in_time(lock):
                self._log(f"another process has the lock of {self._folder}: answers are written without it")
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not release it: forked children have it too
            os.close(lock)

    def _newest(self, keys: Collection[Key], bucket: bytes) -> dict[Key, bytes]:
        """{key: answer as JSON}, of the newest line of each key in the content of a bucket."""
        wanted = {self._stored(key): key for key in keys}
        answers = {}
        for line in io.BytesIO(bucket):
            stored, _, text = line.partition(b" ")
            if stored in wanted:
                answers[wanted[stored]] = text
        return answers

    def _add_to(self, bucket: str, keys: Collection[Key]) -> None:
        content = self._read(bucket)
        known = self._newest(keys, content)
        new = [
            self._stored(key) + b" " + json.dumps(self._waiting[key], sort_keys=True).encode() + b"\n"
            for key in keys
            if key in self._rejected or not _whole(known.get(key, b""))
        ]
        if not new:
            return
        # The end of a damaged bucket may lack its newline.
        content = content[: content.rfind(b"\n") + 1] + b"".join(new)
        if len(content) > MAX_BYTES:
            content = content[content.index(b"\n", len(content) - int(0.9 * MAX_BYTES)) + 1 :]
        storage.write_bytes(self._path(bucket), content)

    def _read(self, bucket: str) -> bytes:
        path = self._path(bucket)
        try:
            content = _beginning(path, MAX_BYTES + 1)
            if len(content) <= MAX_BYTES:
                return content
            problem = f"has over {MAX_BYTES} bytes"
        except ValueError as error:
            problem = str(error)
        self._log(f"{path} is damaged, and its questions are asked again: {problem}")
        return b""

    def _path(self, bucket: str) -> str:
        return storage.join(self._folder, f"{bucket}.txt")

    def _stored(self, key: Key) -> bytes:
        """The key in a bucket: newer code must not reuse the answers of older code, nor a judge those that it gave under other
        conditions."""
        parts = (*key, envs.CACHE_VERSIONS["evaluation"], self._conditions)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32].encode()


def _by_bucket(keys: Iterable[Key]) -> dict[str, list[Key]]:
    buckets: dict[str, list[Key]] = {}
    for key in keys:
        buckets.setdefault(hashlib.sha256(key[0].encode()).hexdigest()[:2], []).append(key)
    return buckets


def _columns(buckets: Mapping[str, list[Key]]) -> tuple[list[str], list[list[Key]]]:
    return list(buckets), list(buckets.values())


def _locked_in_time(descriptor: int) -> bool:
    give_up = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks, such as some NFS
            return True


def _beginning(path: str, size: int) -> bytes:
    """At most the first `size` bytes of a file; none if it does not exist.

    Raises:
        ValueError: it is a link, a pipe or an empty object.
    """
    try:
        if storage.is_remote(path):
            # Not storage.read_ranges, which tries for 15 s to read an empty object.
            fs, where = storage.filesystem(path)
            content: bytes = fs.cat_file(where, start=0, end=size)
            return content
        with open(open_plain(path, os.O_RDONLY), "rb") as file:
            return file.read(size)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno == errno.EINVAL:  # an empty object has no bytes from 0 on
            raise ValueError("it is empty") from error
        raise


def _parsed(text: bytes) -> Any:
    """
    Raises:
        ValueError: it is not JSON, or nested deeper than `MAX_NESTED`.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_NESTED):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_NESTED}")


def _whole(text: bytes) -> bool:
    try:
        _parsed(text)
    except ValueError:
        return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
