"""Answers of judges: an append-only journal that survives a kill, sealed as Parquet.

    DIR/answers.jsonl      one {"image", "question", "judge", "answer"} per line, while judging goes on
        answers.parquet    the same, sorted, when it is done; the journal is gone then

The key is (SHA-256 of the image file, question, revision of the judge): only questions with a changed image, question
or judge are asked again. Scoring reads only answers, and needs neither weights nor a GPU.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from eval.files import open_plain, write_bytes

JOURNAL, SEALED = "answers.jsonl", "answers.parquet"
Key = tuple[str, str, str]  # image digest, question, judge revision
COLUMNS = ("image", "question", "judge", "answer")


class SharedAnswers(Protocol):
    """Answers that runs share. It may lose some, which are then asked again."""

    def find(self, keys: Collection[Key]) -> Mapping[Key, Any]:
        """The known answers to these."""

    def add(self, rows: Iterable[tuple[Key, Any]]) -> None:
        """Shares answers, at once or later. The first answer to a key is kept."""

    def reject(self, keys: Iterable[Key]) -> None:
        """These answers, which `find` returned, are of a wrong type. The next ones that are added replace them."""


class Answers:
    """Answers in a folder. Writing takes a lock, so that a second writer is refused.

    Raises (on opening):
        ValueError: another process writes there, a line other than the last is damaged, or the journal to write is a
            link or a pipe.
    """

    def __init__(self, folder: str | Path, write: bool = False):
        self.folder = Path(folder)
        self._answers: dict[Key, Any] = {}
        self._file = None
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(open_plain(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise ValueError(f"{self.folder} is being judged by another process") from error
        self._read_sealed()
        whole = self._read_journal()
        if self._file is not None:
            self._file.truncate(whole)  # a partial line would also damage the next one

    def _read_sealed(self) -> None:
        path = self.folder / SEALED
        if not path.is_file():
            return
        import pyarrow.parquet as parquet

        try:
            columns = [parquet.read_table(path, columns=list(COLUMNS))[name].to_pylist() for name in COLUMNS]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a table of answers: {error}") from error
        self._answers.update(((i, q, j), json.loads(a)) for i, q, j, a in zip(*columns, strict=True))

    def _read_journal(self) -> int:
        """Reads complete lines. Returns their length in bytes; the rest is a partial line."""
        path = self.folder / JOURNAL
        if self._file is not None:
            self._file.seek(0)
            data = self._file.read()
        elif path.is_file():
            data = path.read_bytes()
        else:
            return 0
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key = (row["image"], row["question"], row["judge"])
                self._answers.setdefault(key, row["answer"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if number == len(lines):  # an unwritten page may end in the line's own newline
                    return whole - len(line) - 1
                raise ValueError(f"{path}, line {number} is damaged; remove it to ask that question again") from error
        return whole

    def __contains__(self, key: Key) -> bool:
        return key in self._answers

    def __getitem__(self, key: Key) -> Any:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._answers)

    def add(self, rows: Iterable[tuple[Key, Any]]) -> None:
        """Appends answers and syncs them to disk. The first answer to a key is kept."""
        assert self._file is not None, "opened for reading"
        lines = []
        for key, answer in rows:
            if key in self._answers:
                continue
            self._answers[key] = answer
            lines.append(json.dumps(dict(zip(COLUMNS, (*key, answer), strict=True)), ensure_ascii=True) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def seal(self) -> Path:
        """Writes all answers as Parquet, in the order of their keys, and removes the journal.

        A kill in between leaves both files, which together give the same answers.
        """
        import pyarrow as pa
        import pyarrow.parquet as parquet

        assert self._file is not None, "opened for reading"
        keys = sorted(self._answers)
        arrays = [pa.array([key[i] for key in keys], pa.string()) for i in range(3)]
        texts = [json.dumps(self._answers[key], sort_keys=True, ensure_ascii=True) for key in keys]
        table = pa.table(dict(zip(COLUMNS, (*arrays, pa.array(texts, pa.string())), strict=True)))
        path, buffer = self.folder / SEALED, io.BytesIO()
        parquet.write_table(table, buffer, compression="zstd")
        write_bytes(path, buffer.getvalue())
        self._file.truncate(0)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Releases the lock. An empty journal is removed."""
        if self._file is not None:
            path = self.folder / JOURNAL
            if path.is_file() and path.stat().st_size == 0:
                path.unlink()
            self._file.close()
            self._file = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
