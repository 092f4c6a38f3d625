"""Feeds broken tars, tables and text to the readers of a user's source.

    python tests/fuzz/fuzz_readers.py [--seconds 600] [--kind tar]

Each input is a valid one that was changed at random, or a seed of tests/fuzz/seeds (inputs that once failed). It must be
read or refused in one ValueError, within seconds, and no file outside its folder may be opened.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEEDS = Path(__file__).parent / "seeds"
SLOW_S = 20.0  # of the processor, for one input of some kilobytes


def _tar() -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a.png", b"\x89PNG1"), ("a.txt", b"one"), ("é/b.png", b"\x89PNG2"), ("é/b.json", b'{"text": "two"}')):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        info = tarfile.TarInfo("metadata.csv")
        data = b"file_name,text\nc.png,three\n"
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _parquet(compression: str = "none", **options) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"\x89PNG%d" % (i % 3), "path": f"{i}.png"} for i in range(20)], kind)
    table = pa.table({"image": images, "text": [["one", str(i)] for i in range(20)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=7, compression=compression, **options)
    return buffer.getvalue()


def _arrow() -> bytes:
    import pyarrow as pa

    batch = pa.record_batch({"image": [b"\x89PNG%d" % i for i in range(9)], "text": [f"text {i}" for i in range(9)]})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    return buffer.getvalue()


_ROWS = [("a.png", 'a "red" barn, at dusk'), ("b.png", "two\nboats"), ("c.png", "caf\u00e9 \U0001f600")]


def _csv() -> bytes:
    quoted = [(name, text.replace('"', '""')) for name, text in _ROWS]
    return ("file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in quoted)).encode()


def _jsonl() -> bytes:
    return "".join(json.dumps({"file_name": name, "text": [text]}) + "\n" for name, text in _ROWS).encode()


def _json() -> bytes:
    return json.dumps([{"file_name": name, "text": text} for name, text in _ROWS]).encode()


# kind -> (name of the file, valid contents to change)
KINDS: dict[str, tuple[str, Callable[[], list[bytes]]]] = {
    "tar": ("x.tar", lambda: [_tar(), gzip.compress(_tar(), mtime=0)]),
    "parquet": (
        "x.parquet",
        lambda: [_parquet(), _parquet("zstd"), _parquet(use_dictionary=False, data_page_version="2.0")],
    ),
    "arrow": ("x.arrow", lambda: [_arrow()]),
    "csv": ("metadata.csv", lambda: [_csv()]),
    "jsonl": ("metadata.jsonl", lambda: [_jsonl()]),
    "json": ("metadata.json", lambda: [_json()]),
    "text": ("a.txt", lambda: ["a red barn\n\u65e5\u672c".encode(), "a barn".encode("utf-16")]),
    "sidecar": ("a.json", lambda: [b'{"caption": ["one", "two"], "width": 8}']),
}
NUMBERS = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\0" * 8, b"\xff\xff\xff\x7f", b"99999999999", b'"', b",", b"\n", b"[" * 40, b"{", b"../", b"\xed\xa0\x80")  # fmt: skip


def change(data: bytes, rng: random.Random) -> bytes:
    """The data with one to six changes: bytes set, pieces removed, repeated, swapped or inserted, or the end cut off."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if not content:
            return b""
        at = rng.randrange(len(content))
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 512)), len(content) - at)
        how = rng.randrange(7)
        if how == 0:
            content[at] = rng.randrange(256)
        elif how == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del content[at : at + length]
        elif how == 3:
            content[at:at] = content[at : at + length] * rng.randint(1, 4)
        elif how == 4:
            piece = rng.choice(NUMBERS)
            content[at : at + len(piece)] = piece
        elif how == 5:
            to = rng.randrange(len(content))
            content[to : to + length] = content[at : at + length]
        elif rng.random() < 0.2:
            del content[at:]
    return bytes(content)


class Opened:
    """Notes what Python opens outside the source and the temporary folder."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event != "open" or not self.allowed or not isinstance(args[0], str | bytes):
            return
        path = os.fsdecode(args[0])
        if os.path.isabs(path) and not path.startswith(self.allowed):
            self.outside.append(path)


def try_one(name: str, data: bytes, scratch: Path) -> str:
    """Reads a source with this file; returns "read" or "refused".

    Raises:
        Exception: anything but a ValueError that names a file.
    """
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources.base import Account, open_corpus, write_corpus

    source = scratch / "source"
    source.mkdir(exist_ok=True)
    for old in source.iterdir():
        old.unlink()
    for image in ("a.png", "b.png", "c.png"):
        (source / image).write_bytes(b"\x89PNG")
    (source / name).write_bytes(data)
    with tempfile.TemporaryDirectory(dir=scratch) as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            write_corpus(SourceConfig(), str(source), out)
            corpus = open_corpus(out)
            total = corpus.account()
            for shard in corpus.shards():
                account = Account()
                for record in corpus.read(shard, account):
                    assert isinstance(record.data, bytes) and record.locator.encode() + record.detail.encode()
                    assert all(text.encode() and text.strip() for text in record.captions)
                total += account
            total.check()
            return "read"
        except ValueError as error:
            if type(error) is not ValueError or name not in str(error) or "\n" in str(error):
                raise
            return "refused"


def run(seconds: float, kinds: list[str], seed: int = 0, keep: Path | None = None) -> dict[str, int]:
    """Tries the seeds, then random inputs for so many seconds; returns how many were read and refused.

    Raises:
        AssertionError: naming the input, which is kept in `keep`.
    """
    rng = random.Random(seed)
    valid = {kind: KINDS[kind][1]() for kind in kinds}
    counts = {"read": 0, "refused": 0}
    opened = Opened()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for kind in kinds:
            for data in valid[kind]:
                assert try_one(KINDS[kind][0], data, scratch) == "read", kind
        opened.allowed = (folder, tempfile.gettempdir(), sys.prefix, sys.base_prefix, str(ROOT), "/usr", "/proc/self", "/dev/null")  # fmt: skip
        seeds = [(path.name.split("-")[0], path.read_bytes()) for path in sorted(SEEDS.glob("*")) if path.is_file()]
        waiting = [(kind, data) for kind, data in seeds if kind in kinds]
        end = time.monotonic() + seconds
        while waiting or time.monotonic() < end:
            if waiting:
                kind, data = waiting.pop()
            else:
                kind = rng.choice(kinds)
                data = change(rng.choice(valid[kind]), rng)
            begun = time.process_time()
            try:
                counts[try_one(KINDS[kind][0], data, scratch)] += 1
                assert time.process_time() - begun < SLOW_S, "slow"
                assert not opened.outside, f"opened {opened.outside}"
            except Exception as error:
                path = (keep or Path(tempfile.gettempdir())) / f"{kind}-{abs(hash(data)) % 10**10:010d}"
                path.write_bytes(data)
                opened.allowed = ()
                raise AssertionError(f"{path}: {type(error).__name__}: {error}") from error
        opened.allowed = ()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kind", choices=KINDS, action="append", help="all if none is named")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(run(options.seconds, options.kind or list(KINDS), options.seed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
