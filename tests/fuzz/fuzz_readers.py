"""Feeds broken tars, tables, text, images, robots.txt and checkpoint metadata to the readers of untrusted data.

    python tests/fuzz/fuzz_readers.py [--seconds 600] [--kind tar]

Each input is a valid file that was changed at random, or a seed of tests/fuzz/seeds (inputs that once failed). The
reader must read it or raise one ValueError, within seconds and bounded memory, and open no file outside its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEEDS = Path(__file__).parent / "seeds"
SLOW_S = 20.0  # CPU time, for one input of some kilobytes
MEMORY_BYTES = 4 * 2**30  # beyond the process's memory at its start
MAX_PIXELS = 4_000_000
BLOCK = 512  # of a tar


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


def _sealed(tar: bytes) -> bytes:
    """The archive with right checksums, so that a changed header is read instead of refused."""
    content = bytearray(tar)
    for at in range(0, len(content) - BLOCK + 1, BLOCK):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])
    return bytes(content)


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


_URLS = [
    ("https://a.test/1.png", 'a "red" barn, at dusk'),
    ("http://[::1]:80/b", "two\nboats"),
    ("https://é.test/?q=%20", ""),
]


def _url_csv() -> bytes:
    quoted = [(url, text.replace('"', '""')) for url, text in _URLS]
    return ("url,text\n" + "".join(f'{url},"{text}"\n' for url, text in quoted)).encode()


def _url_parquet(**options) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table({"URL": [url for url, _ in _URLS] * 5, "text": [[text, "more"] for _, text in _URLS] * 5})
    pq.write_table(table, buffer, row_group_size=4, **options)
    return buffer.getvalue()


AGENT = "nucleus-flyte/0.1"
ROBOTS_URLS = (
    "https://a.test/",
    "https://a.test/private/1.png",
    "https://a.test/a/b/c.gif?x=1",
    "https://a.test/é%2f$",
)
_ROBOTS = b"""# a site
User-agent: *
Disallow: /private/
Allow: /private/*.png$
Crawl-delay: 2

User agent: Nucleus*
Useragent: Otherbot # of somebody
Disallow: /*/c.gif
Allow /a/
Sitemap: https://a.test/sitemap.xml
user-agent nucleus-flyte/0.1
disalow: /\xc3\xa9
"""


def _images() -> list[bytes]:
    import numpy as np
    import pillow_heif
    from PIL import Image, ImageCms

    pillow_heif.register_heif_opener()
    levels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    image = Image.fromarray(levels).resize((80, 48))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: list[tuple[str, Image.Image, dict]] = [
        ("JPEG", image, {"icc_profile": profile, "exif": exif}),
        ("JPEG", image, {"progressive": True, "restart_marker_rows": 1}),
        ("PNG", image.convert("RGBA"), {"icc_profile": profile}),
        ("PNG", image.convert("P"), {"transparency": 0}),
        ("PNG", Image.fromarray(levels[..., 0].astype(np.uint16) * 257), {}),
        ("WEBP", image, {"icc_profile": profile, "exif": exif}),
        ("WEBP", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("TIFF", image, {"compression": "tiff_lzw"}),
        ("BMP", image, {}),
        ("PPM", image, {}),
        ("AVIF", image, {}),
        ("JPEG2000", image, {}),
        ("HEIF", image, {"exif": exif, "quality": 50}),
        ("TIFF", image, {"compression": "tiff_lzw", "tiffinfo": {0x0112: 6}}),
    ]
    contents = []
    for form, picture, options in forms:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        contents.append(buffer.getvalue())
    return contents


def _metadata() -> list[bytes]:
    import pathlib
    import pickle

    import torch
    import torch.distributed.checkpoint as dcp

    from model.weights.checkpoints import METADATA, without_warning

    state = {"model": {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, "step": 3}
    with tempfile.TemporaryDirectory() as folder, without_warning():
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        content = (Path(folder) / METADATA).read_bytes()
    metadata = pickle.loads(content)
    metadata.storage_meta.checkpoint_id = pathlib.PurePosixPath("/a/b")
    return [content, *(pickle.dumps(metadata, protocol) for protocol in (2, 4, 5))]


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
    "image": ("a.img", _images),
    "metadata": (".metadata", _metadata),
    "urlcsv": ("u.csv", lambda: [_url_csv(), _url_csv().replace(b",", b";"), _url_csv().decode().encode("utf-16")]),
    "urlparquet": ("u.parquet", lambda: [_url_parquet(), _url_parquet(use_dictionary=False)]),
    "robots": ("robots.txt", lambda: [_ROBOTS]),
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


def try_image(name: str, data: bytes, scratch: Path) -> str:
    """Decodes an image as curation and encoding do; see `try_source`."""
    from tasks.curation.scoring import decoding

    (scratch / name).write_bytes(data)  # the file that remains if the process dies
    try:
        header, image = decoding.inspect_and_decode(data, MAX_PIXELS, decoding.DECODABLE)
        if isinstance(image, ValueError):
            raise image
        assert image.mode == "RGB" and image.size == (header.width, header.height)
        assert decoding.decode(data, MAX_PIXELS).tobytes() == image.tobytes(), "two decodes differ"
        return "read"
    except (decoding.UndecodableError, decoding.TooManyPixelsError) as error:
        assert "\n" not in str(error), error
        return "refused"


def try_metadata(name: str, data: bytes, scratch: Path) -> str:
    """Reads the metadata of a checkpoint; see `try_source`."""
    from model.weights.checkpoints import CheckpointReader

    (scratch / name).write_bytes(data)
    try:
        assert type(CheckpointReader(scratch).read_metadata()).__name__ == "Metadata"
        return "read"
    except ValueError as error:
        if type(error) is not ValueError or name not in str(error):
            raise
        return "refused"


def try_source(name: str, data: bytes, scratch: Path) -> str:
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


def try_urls(name: str, data: bytes, scratch: Path) -> str:
    """Reads a table of URLs, whole and in ranges of two rows; see `try_source`."""
    from tasks.curation.config import SourceConfig, UrlConfig
    from tasks.curation.sources.base import Account
    from tasks.curation.sources.file_trees import find
    from tasks.curation.sources.urls import network, tables

    source = scratch / "urls"
    source.mkdir(exist_ok=True)
    for old in source.iterdir():
        old.unlink()
    (source / name).write_bytes(data)
    place, result = find(str(source)), []
    try:
        for images_per_shard in (1000, 2):
            config = SourceConfig(urls=UrlConfig(), images_per_shard=images_per_shard)
            chosen = list(tables.ranges(place, config, Account()))
            result.append([row for one in chosen for row in tables.rows(place, one, config)])
    except ValueError as error:
        if type(error) is not ValueError or name not in str(error) or "\n" in str(error):
            raise
        return "refused"
    assert result[0] == result[1] and [row.row for row in result[0]] == list(range(len(result[0])))
    for row in result[0]:
        assert all(text.encode() and text.strip() for text in row.captions) and "\n" not in row.problem
        with contextlib.suppress(network.ForbiddenError):
            network.check_url(row.url, allow_http=True)
    return "read"


def try_robots(name: str, data: bytes, scratch: Path) -> str:
    """Parses a robots.txt and an X-Robots-Tag; where our parser calls Protego, the answers must equal Protego's."""
    from protego import Protego

    from tasks.curation.sources.urls import robots

    (scratch / name).write_bytes(data)
    text = data.decode("utf-8", "replace")
    robots.forbidden_by_tag(text.split("\n"), ("noai", "none"), AGENT)
    rules, alone = robots.Rules(AGENT, text), Protego.parse(text)
    for url in ROBOTS_URLS:
        assert rules.allows(url) == alone.can_fetch(url, AGENT), url
    assert rules.delay_s() == float(alone.crawl_delay(AGENT) or 0.0) >= 0.0
    return "read"


TRY = {
    "image": try_image,
    "metadata": try_metadata,
    "urlcsv": try_urls,
    "urlparquet": try_urls,
    "robots": try_robots,
}  # the other kinds are files of a source


def run(seconds: float, kinds: list[str], seed: int = 0, keep: Path | None = None) -> dict[str, int]:
    """Tries the seeds, then random inputs for `seconds`; returns how many were read and refused.

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
                assert TRY.get(kind, try_source)(KINDS[kind][0], data, scratch) == "read", kind
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
                if kind == "tar" and rng.random() < 0.7:
                    data = _sealed(data)
                    data = gzip.compress(data, 1, mtime=0) if rng.random() < 0.1 else data
            begun = time.process_time()
            try:
                counts[TRY.get(kind, try_source)(KINDS[kind][0], data, scratch)] += 1
                assert time.process_time() - begun < SLOW_S, "slow"
                assert not opened.outside, f"opened {opened.outside}"
            except Exception as error:
                path = (keep or Path(tempfile.gettempdir())) / f"{kind}-{hashlib.sha256(data).hexdigest()[:10]}"
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
    import torch  # noqa: F401  (before the limit: it maps gigabytes that it does not use)

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    print(run(options.seconds, options.kind or list(KINDS), options.seed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
