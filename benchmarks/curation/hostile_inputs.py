"""The hostile inputs that hostile.py measures: a builder for each kind writes a source into a folder."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {}  # name -> how reading it must end, builder


def kind(ends: str) -> Callable:
    """Registers a builder of one hostile source. ends: "read", "refused", or "read or refused"."""

    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        KINDS[build.__name__] = ends, build
        return build

    return register


def picture(seed: int = 0) -> bytes:
    """A PNG of 8 x 8 px."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def header(name: bytes, size: int, flag: bytes, magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header of 512 bytes."""
    number = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[148:156] = number, b"00000000000\0", b" " * 8
    block[156:157], block[257:265] = flag, magic
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def sparse(path: Path, start: bytes, size: int, end: bytes = b"") -> None:
    """A file of `size` bytes with a hole in its middle."""
    with open(path, "wb") as file:
        file.write(start)
        file.seek(size - len(end))
        file.write(end)
        file.truncate(size)


# ---------------------------------------------------------------- tars


@kind("refused")
def sparse_member_gnu(folder: Path) -> None:
    block = bytearray(header(b"a.png", 512, b"S", b"ustar  \0"))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    block[483:495] = b"%011o\0" % (4 * 2**30 - 1)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (folder / "x.tar").write_bytes(bytes(block) + bytes(512 + 1024))


@kind("refused")
def sparse_member_pax(folder: Path) -> None:
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n31 GNU.sparse.realsize=4294967296\n"
    data = header(b"x", len(records), b"x") + pad(records) + header(b"a.png", 512, b"0") + bytes(512 + 1024)
    (folder / "x.tar").write_bytes(data)


@kind("refused")
def long_name_1_gib(folder: Path) -> None:
    sparse(folder / "x.tar", header(b"././@LongLink", 2**30, b"L", b"ustar  \0"), 2**30 + 512 + 2048)


@kind("refused")
def long_name_xz(folder: Path) -> None:
    """In streams of 16 MiB each, which are one to a reader and cheap to make."""
    with open(folder / "x.tar.xz", "wb") as file:
        file.write(lzma.compress(header(b"././@LongLink", 2**30, b"L", b"ustar  \0")))
        file.write(lzma.compress(b"a" * 16 * MIB, preset=0) * 64)


@kind("refused")
def pax_header_1_gib(folder: Path) -> None:
    sparse(folder / "x.tar", header(b"x", 2**30, b"x") + b"1073741824 path=", 2**30 + 512 + 2048)


@kind("read or refused")
def pax_global_headers(folder: Path) -> None:
    """A thousand headers of nearly 1 MiB, each with other keys."""
    with gzip.open(folder / "x.tar.gz", "wb", compresslevel=1) as file:
        for i in range(1000):
            record = b"%d k%d=%s\n" % (2**20 - 512, i, b"v" * (2**20 - 512 - 9 - len(str(i)) - 3))
            record = record[: 2**20 - 513] + b"\n"
            file.write(header(b"g", len(record), b"g") + pad(record))
        file.write(header(b"a.png", len(picture()), b"0") + pad(picture()) + bytes(1024))


@kind("refused")
def pax_headers_in_a_row(folder: Path) -> None:
    """200,000 headers before one member."""
    record = b"11 path=ab\n"
    (folder / "x.tar").write_bytes((header(b"x", len(record), b"x") + pad(record)) * 200_000)


@kind("refused")
def gzip_bomb(folder: Path) -> None:
    """2 GiB of zeros in gzip members of 16 MiB each, which are one stream to a reader and cheap to make."""
    with open(folder / "x.tar.gz", "wb") as file:
        file.write(gzip.compress(header(b"a.png", 8**11 - 1, b"0")))
        file.write(gzip.compress(bytes(16 * MIB)) * 128)


@kind("refused")
def bzip2_bomb(folder: Path) -> None:
    import bz2

    with open(folder / "x.tar.bz2", "wb") as file:
        file.write(bz2.compress(header(b"a.png", 8**11 - 1, b"0")))
        file.write(bz2.compress(bytes(16 * MIB)) * 32)


@kind("refused")
def xz_dictionary_of_1_gib(folder: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}]
    (folder / "x.tar.xz").write_bytes(lzma.compress(header(b"a.png", 10, b"0") + bytes(2048), filters=filters))


@kind("read")
def most_members(folder: Path) -> None:
    _members(folder, 300_000)


@kind("refused")
def too_many_members(folder: Path) -> None:
    _members(folder, 300_001)


def _members(folder: Path, count: int) -> None:
    with open(folder / "x.tar", "wb") as file:
        for i in range(count - 1):
            file.write(header(b"folder/picture_%07d.png" % i, 0, b"0"))
        file.write(header(b"z.png", len(picture()), b"0") + pad(picture()) + bytes(1024))


@kind("refused")
def long_names(folder: Path) -> None:
    """100,000 names of 4,000 bytes."""
    with open(folder / "x.tar", "wb") as file:
        for i in range(100_000):
            name = (b"%07d" % i) * 571 + b".png\0"
            file.write(header(b"././@LongLink", len(name), b"L", b"ustar  \0") + pad(name) + header(b"a", 0, b"0"))
        file.write(bytes(1024))


@kind("read")
def long_names_of_folders_of_captions(folder: Path) -> None:
    """16,000 texts, each in its own folder with a name of 3.9 kB, whose composed form without case is three times as long."""
    with open(folder / "x.tar", "wb") as file:
        for i in range(16_000):
            name = f"captions/{chr(0x1D160) * 970}{i:05d}/a.txt\0".encode()
            file.write(header(b"././@LongLink", len(name), b"L", b"ustar  \0") + pad(name) + header(b"a", 0, b"0"))
        file.write(header(b"a.png", len(picture()), b"0") + pad(picture()) + bytes(1024))


@kind("read")
def one_key_for_all_members(folder: Path) -> None:
    """100,000 images and texts of one WebDataset key."""
    with open(folder / "x.tar", "wb") as file:
        for i in range(50_000):
            file.write(header(b"a.%d.png" % i, 0, b"0") + header(b"a.%d.x.txt" % i, 0, b"0"))
        file.write(bytes(1024))


@kind("refused")
def zeros_behind_the_end(folder: Path) -> None:
    start = header(b"a.png", len(picture()), b"0") + pad(picture()) + bytes(1024)
    sparse(folder / "x.tar", start, 20 * 2**30)


@kind("read")
def image_at_the_cap_in_a_tar(folder: Path) -> None:
    size = 256 * MIB
    sparse(folder / "x.tar", header(b"a.png", size, b"0") + picture(), 512 + size + 1024)


# ---------------------------------------------------------------- metadata and captions


def _beside_a_picture(folder: Path) -> None:
    (folder / "a.png").write_bytes(picture())


@kind("refused")
def metadata_jsonl_of_10_gib(folder: Path) -> None:
    _beside_a_picture(folder)
    sparse(folder / "metadata.jsonl", b'{"file_name": "a.png", "text": "', 10 * 2**30)


@kind("read or refused")
def metadata_jsonl_at_the_cap(folder: Path) -> None:
    _beside_a_picture(folder)
    row = json.dumps({"file_name": "a.png", "text": "a red barn \U0001f600"}, ensure_ascii=False).encode() + b"\n"
    (folder / "metadata.jsonl").write_bytes(row * (63 * MIB // len(row)))


@kind("refused")
def metadata_jsonl_one_line(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": [' + b"[]," * (20 * MIB) + b"[]]}")


@kind("refused")
def metadata_csv_quote_never_closed(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.csv").write_bytes(b'file_name,text\na.png,"' + b"a red barn\n" * (5 * MIB))


@kind("refused")
def metadata_csv_of_commas(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png" + b"," * (60 * MIB))


@kind("refused")
def metadata_csv_of_quoted_fields(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png" + b',"\n"' * (15 * MIB))


@kind("refused")
def metadata_csv_of_450000_columns(folder: Path) -> None:
    """Rows of as many fields, most with a blank in front."""
    _beside_a_picture(folder)
    columns = b", ".join(b"%06x" % i for i in range(450_000))
    row = b"a.png,text" + b", aaaaaa" * 450_000 + b"\n"
    (folder / "metadata.csv").write_bytes(b"file_name,text, " + columns + b"\n" + row * 3)


@kind("refused")
def metadata_csv_of_a_header_of_commas(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text" + b"," * (60 * MIB))


@kind("read")
def metadata_csv_of_10000_columns(folder: Path) -> None:
    """64 MiB of rows with a blank behind each of two captions. In the last row alone it is no habit of the writer."""
    for i in range(8):
        (folder / f"{i}.png").write_bytes(picture())
    middle = b"," * 9_995
    head = b"file_name,caption,a" + middle + b"text,b\n"
    count = (64 * MIB - len(head)) // (len(middle) + 30)
    rows = [b"%d.png,c%d, 5%sc%d, 5\n" % (i % 8, i % 9, middle, i % 9) for i in range(count)]
    (folder / "metadata.csv").write_bytes(head + b"".join(rows[:-1]) + rows[-1].replace(b", 5\n", b", five\n"))


@kind("refused")
def metadata_csv_of_blank_lines(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,a\n" + b"\n" * (60 * MIB))


@kind("refused")
def metadata_json_nested(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.json").write_bytes(b"[" * (60 * MIB))


@kind("refused")
def metadata_json_of_empty_lists(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "metadata.json").write_bytes(b'[{"file_name": "a.png", "text": [' + b"[]," * (20 * MIB) + b"[]]}]")


@kind("read or refused")
def metadata_json_at_the_cap(folder: Path) -> None:
    _beside_a_picture(folder)
    row = b'{"file_name": "a.png", "text": "a red barn at dusk, with a door"},'
    (folder / "metadata.json").write_bytes(b"[" + row * (63 * MIB // len(row)) + row[:-1] + b"]")


@kind("read")
def sidecars_of_10_gib(folder: Path) -> None:
    for ext in ("txt", "json"):
        (folder / f"{ext}.png").write_bytes(picture())
        sparse(folder / f"{ext}.{ext}", b"a red barn", 10 * 2**30)


@kind("read")
def sidecar_json_of_empty_lists(folder: Path) -> None:
    _beside_a_picture(folder)
    (folder / "a.json").write_bytes(b"[" + b"[]," * (4 * MIB // 3 - 2) + b"[]]")


# ---------------------------------------------------------------- folders


@kind("read")
def image_of_1_tib(folder: Path) -> None:
    _beside_a_picture(folder)
    sparse(folder / "b.png", b"", 2**40)


@kind("read")
def links_pipes_and_sockets(folder: Path) -> None:
    import socket

    _beside_a_picture(folder)
    os.mkfifo(folder / "b.png")
    os.mkfifo(folder / "a.txt")
    (folder / "c.png").symlink_to("/dev/zero")
    (folder / "metadata.csv").symlink_to("/dev/zero")
    (folder / "d").symlink_to("/")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "e.png"))


@kind("read")
def one_key_for_all_files(folder: Path) -> None:
    for i in range(5000):
        (folder / f"a.{i}.png").write_bytes(b"")
        (folder / f"a.{i}.x.txt").write_bytes(b"")


@kind("read")
def folders_500_deep(folder: Path) -> None:
    at = folder
    for _ in range(500):
        at = at / "images"  # for a folder of this name, a folder of captions is searched next to it
    at.mkdir(parents=True)
    _beside_a_picture(at)


@kind("read")
def tar_of_repeated_image_folders(folder: Path) -> None:
    """Each of 2,000 folders is below 1,000 more with a name for which folders of captions are searched."""
    data = picture()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i in range(2000):
            entry = tarfile.TarInfo("img/" * 1000 + f"{i:06d}/a.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("z/b.txt"))
