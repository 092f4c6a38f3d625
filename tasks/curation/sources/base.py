"""The interface of sources: a corpus is a table of shards, and a shard yields records.

    write_corpus(config, path, out_dir)                                      a user's own images: the only scan
    write_made_shard(config, i, part) ... made_corpus(parts, out_dir)        made records
        -> shards.parquet, files/*.parquet, report.json
    open_corpus(out_dir).read(shard, account) -> Record, Record, ...

A shard is a tar, a range of row groups of a Parquet file, an Arrow file, or a list of image files. It is fixed when it
is first seen: a new file in the source changes no other shard. The original bytes stay in place.

Every file of a source is counted once, by the scan or by the reader of a shard: see `Account`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from tasks.curation.sources.formats import FORMATS
from tasks.manifest import visible

if TYPE_CHECKING:
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources.corpus import Corpus

SHARDS = pa.schema(
    [
        ("shard_id", pa.string()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("digest", pa.string()),
        ("source", pa.string()),
    ]
)
SHARDS_TABLE, FILES_FOLDER, REPORT, TRUTH_TABLE = "shards.parquet", "files", "report.json", "truth.parquet"
LISTS = f"{FILES_FOLDER}/"  # the lists of loose files, one for each shard: artifacts.fetch(without=(LISTS,))

# Images that curation decodes or rejects by name; other files are counted as left out.
HEIF_EXTENSIONS = ("heic", "heif", "hif") if find_spec("pillow_heif") else ()
IMAGE_EXTENSIONS = (*"png jpg jpeg jpe jfif webp gif bmp tif tiff avif jp2 ppm pgm".split(), *HEIF_EXTENSIONS)
# Pictures and other media that curation does not read. They are compared with texts and rows as images are: of two that
# are equally near, neither is chosen. Raw photographs, videos, sound, documents, and other formats of images.
OTHER_MEDIA = frozenset(
    "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f "
    "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv vob webm wmv aac flac m4a mp3 oga ogg opus wav wma djvu doc docx pdf "
    "ai apng avifs bpg cur dcm dds emf eps exr fits flif hdr heic heics heif hif icns ico j2c j2k jng jp2 jpf jpm jpx "
    "jxl jxr mng pam pbm pcx pfm pnm psb psd qoi ras rgb sgi svg svgz tga wdp wmf xbm xcf xpm".split()
)
# Files that people and tools keep next to an image or in its WebDataset sample. Any other file that is left out has the
# text of its name, so that no similar image gets it.
COMPANIONS = frozenset(
    "npz npy pt pth safetensors ten tb pyd pkl pickle msg mp cbor jsn yaml yml xml csv tsv cls cls2 lab count index inx id "
    "uid key url score md5 sha256 xmp aae pp3 dop thm bak log".split()
)
# Longer suffixes first.
TAR_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.lzma", ".tar", *".tgz .taz .tbz2 .tbz .tb2 .txz .tlz".split())
ZSTD_TAR_SUFFIXES = (".tar.zst", ".tar.zstd", ".tzst")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "raw")

MAX_IMAGE_BYTES = 256 * 2**20  # larger files are not read into memory
MAX_EXAMPLE_CHARS = 200  # of a name in an account or a message
MAX_CONTAINER_BYTES = 32 * 2**30  # of one tar, Parquet or Arrow file

TEXT_OF_LEFT_OUT = "text of a file that is left out"
CHANGED = "has changed since the source was scanned; start the run again"
_SUFFIXES = [suffix[1:] for suffix in TAR_SUFFIXES]
_CONTAINER = re.compile(rf"\.({'|'.join(map(re.escape, [*_SUFFIXES, 'parquet', *FORMATS]))}):", re.IGNORECASE)

UNREADABLE_CAPTION = "unreadable_caption"
AMBIGUOUS_CAPTION = "ambiguous_caption"
UNREADABLE_FILE = "unreadable_file"
URL_PROBLEMS = tuple(
    f"url_{why}" for why in ("invalid", "forbidden", "robots", "gone", "failed", "too_large", "type", "redirects")
)  # rules of images that were not downloaded (urls/fetch.py)
TAKEDOWN = "takedown"  # on the list of curation.takedown
PROBLEMS = (TAKEDOWN, UNREADABLE_FILE, UNREADABLE_CAPTION, AMBIGUOUS_CAPTION, *URL_PROBLEMS)  # rules of the ledger


class Shard(NamedTuple):
    """A row of shards.parquet.

    shard_id: 16 hex digits, a function of the shard's content, of its name inside the source and of settings that
        affect its captions; not of the location of the source.
    kind: "tar", "parquet", "files", "urls" (downloaded images), or one of formats.FORMATS.
    uri: of the tar, Parquet or Arrow file; of the source's root for "files". A relative one is next to the table.
    first_row, num_rows: the range of a Parquet file's rows; num_rows is -1 if it is unknown before reading (a remote
        tar).
    size_bytes: of the file, of the row groups, or of the image files together.
    digest: SHA-256 of local content; size and checksum of a remote object; for "files" over names and digests.
    source: "user", "scenes", or a name of made/registry.py.
    """

    shard_id: str
    kind: str
    uri: str
    first_row: int
    num_rows: int
    size_bytes: int
    digest: str
    source: str


class Record(NamedTuple):
    """One image of a source, with the captions that its owner wrote.

    key: a function of the image's path inside the source, so that other images do not change it.
    data: the original bytes; b"" if they cannot be read.
    ext: lower case, without a dot; "bin" if neither the name nor the first bytes show the format.
    captions: uncut, in their original order; [] if there are none.
    source: "user", "scenes", or a name of made/registry.py.
    locator: the user's own file, tar member or row: `holiday/a.jpg`, `x.tar:a.jpg`, `x.parquet:7`. For a remote source
        it begins with the URI. Control characters are escaped.
    row: position in the shard, from 0.
    problem, detail: "" or one of `PROBLEMS`, and one sentence that names the file and the remedy. A detail without a
        problem says why there is no caption.
    """

    key: str
    data: bytes
    ext: str
    captions: list[str]
    source: str
    locator: str
    row: int
    problem: str = ""
    detail: str = ""


class Options(NamedTuple):
    """The settings of a recipe's `source` that readers need."""

    encoding: str | None = None
    caption_columns: tuple[str, ...] = ()
    captions_folder: str | None = None


class Account:
    """Counts of a source: seen = used + skipped.

    seen: files, tar members and table rows, links and devices included.
    used: those that are an image, contain images, or describe one.
    records: images that were read as records.
    skipped: reason -> (count, name of an example).
    """

    def __init__(self, seen: int = 0, used: int = 0, records: int = 0, skipped: dict | None = None) -> None:
        self.seen, self.used, self.records = seen, used, records
        self.skipped: dict[str, tuple[int, str]] = dict(skipped or {})

    def use(self, count: int = 1) -> None:
        """Counts files that are images, contain them or describe them."""
        self.seen += count
        self.used += count

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Counts files that are left out. The example of a reason is the first by name."""
        if not count:
            return
        self.seen += count
        self._add(reason, count, shortened(visible(example)))

    def _add(self, reason: str, count: int, example: str) -> None:
        before, first = self.skipped.get(reason, (0, example))
        self.skipped[reason] = (before + count, min(first, example))

    def check(self) -> None:
        """Asserts that seen = used + skipped."""
        left_out = sum(count for count, _ in self.skipped.values())
        assert self.seen == self.used + left_out, f"seen {self.seen}, used {self.used}, skipped {left_out}"

    def __add__(self, other: Account) -> Account:
        total = Account(self.seen + other.seen, self.used + other.used, self.records + other.records, self.skipped)
        for reason, (count, example) in other.skipped.items():
            total._add(reason, count, example)
        return total

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Account) and self.to_json() == other.to_json()

    __hash__ = None  # mutable

    def __repr__(self) -> str:
        return f"Account({self.to_json()})"

    def to_json(self) -> dict[str, Any]:
        """{"seen", "used", "records", "skipped": {reason: [count, example]}}, reasons sorted."""
        skipped = {reason: list(self.skipped[reason]) for reason in sorted(self.skipped)}
        return {"seen": self.seen, "used": self.used, "records": self.records, "skipped": skipped}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Account:
        skipped = {reason: (int(count), str(example)) for reason, (count, example) in value["skipped"].items()}
        return cls(int(value["seen"]), int(value["used"]), int(value["records"]), skipped)

    @classmethod
    def total(cls, accounts: Iterable[Account]) -> Account:
        return sum(accounts, cls())

    def left_out(self) -> str:
        """`3 x .heic (IMG_0.HEIC), 1 x .zip (photos.zip)`, the most frequent first; "" if nothing was left out."""
        ordered = sorted(self.skipped.items(), key=lambda item: (-item[1][0], item[0]))
        return ", ".join(f"{count} x {reason} ({example})" for reason, (count, example) in ordered)


def write_corpus(config: SourceConfig, path: str | None, out_dir: str | os.PathLike) -> dict[str, Any]:
    """Scans a user's own images and writes the corpus: shards.parquet, files/*.parquet and report.json.

    Args:
        config: the `source` section of a recipe.
        path: a folder, file or URI; None takes `config.path`.
        out_dir: an empty directory.

    Returns:
        The report: {"digest": of the corpus, independent of its location; "shards", "images" (-1 if a remote tar is among them),
        "size_bytes", "account": of the scan alone, "options": what the reader needs of `config`}.

    Raises:
        ValueError: an error that the scan finds; the message names the user's file, line or row.
    """
    from tasks.curation.sources import scan

    return scan.write_corpus(config, path, out_dir)


def write_made_shard(config: SourceConfig, index: int, out_dir: str | os.PathLike) -> dict[str, Any]:
    """Makes shard `index` of `config.shards` of the rendered scenes and other made sources, in an empty directory.

    Writes NNNNN.tar, a shards.parquet of one row (uri relative), report.json, and truth.parquet (for tests: the planted
    defects). Every record depends on (seed, its number) alone, so that another number of shards gives the same records.

    Raises:
        ValueError: no such shard, no record at all, an unknown source, or more records than a source has.
    """
    from tasks.curation.sources.made import corpus

    return corpus.write_made_shard(config, index, out_dir)


def made_corpus(
    parts: Sequence[str | os.PathLike], out_dir: str | os.PathLike, uris: Sequence[str] | None = None
) -> dict[str, Any]:
    """Writes the table of a made corpus over the directories of `write_made_shard`; copies no tar.

    Args:
        parts: the directories, in any order.
        uris: from where the parts will be read, if not from `parts`.
    """
    from tasks.curation.sources.made import corpus

    return corpus.made_corpus(parts, out_dir, uris)


def open_corpus(corpus_dir: str | os.PathLike) -> Corpus:
    """Opens a corpus that `write_corpus` or `made_corpus` wrote.

    Raises:
        ValueError: the directory is not a corpus.
    """
    from tasks.curation.sources.corpus import Corpus

    return Corpus(corpus_dir)


# ---------------------------------------------------------------- names


def base_name(path: str) -> str:
    """The last part of a path with / as separator."""
    return path[path.rfind("/") + 1 :]


def shortened(name: str, chars: int = MAX_EXAMPLE_CHARS) -> str:
    """A name of at most so many characters, with its beginning and its end."""
    return name if len(name) <= chars else f"{name[: chars // 2]}…{name[chars // 2 - chars + 1 :]}"


def extension(path: str) -> str:
    """The extension in lower case, without the dot; "" if there is none."""
    dot = path.rfind(".")
    return path[dot + 1 :].lower() if path.rfind("/") + 1 < dot else ""


def reason_of(name: str) -> str:
    """The reason for which a file of an unknown kind is left out: its extension."""
    if name.lower().endswith(ZSTD_TAR_SUFFIXES):
        return "zstd tar; decompress it with `zstd -d`"
    return f".{shortened(visible(extension(name)))}" if extension(name) else "no extension"


def is_hidden(path: str) -> bool:
    if not path.startswith(".") and "/." not in path:
        return False
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def is_image(name: str) -> bool:
    return extension(name) in IMAGE_EXTENSIONS


def is_media(name: str) -> bool:
    """Whether a file of this name may have a caption: an image, or one of `OTHER_MEDIA`."""
    return is_image(name) or extension(name) in OTHER_MEDIA


def without_tar_suffix(name: str) -> str:
    """`x` for `x.tar` and `x.tar.gz`."""
    return next((name[: -len(suffix)] for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)), name)


def to_bytes(name: str) -> bytes:
    """The bytes of a name in its file system or archive, which need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def from_bytes(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def record_key(name: str, inner: str | None = None) -> str:
    """The key of a loose file, or of a member or row inside a file; unique in the source.

    `x.tar:a.png` may be a member of x.tar and a file of that name: the key of such a file is written differently.
    """
    if inner is None:
        place = f"\0{name}" if _CONTAINER.search(name) else name
    else:
        place = f"{name}\0{inner}" if _CONTAINER.search(name) else f"{name}:{inner}"
    return f"user-{hashlib.sha256(to_bytes(place)).hexdigest()[:20]}"


def check_size(shown: str, size: int) -> None:
    """
    Raises:
        ValueError: a tar, Parquet or Arrow file is larger than the limit.
    """
    if size > MAX_CONTAINER_BYTES:
        raise ValueError(f"{shown} is larger than {MAX_CONTAINER_BYTES // 2**30} GiB; divide it")


def digest_of(*parts: Any) -> str:
    """SHA-256 of JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def shard_id(kind: str, name: str, first_row: int, digest: str, options: Options, more: str = "") -> str:
    """more: digest of other inputs of the records: a table's schema, or the rows of tables next to a tar."""
    return digest_of(kind, name, first_row, digest, options, more)[:16]


def count_of(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def records_in_order(records: Iterable[Record]) -> Iterator[Record]:
    """The records with their positions as `row`."""
    for row, record in enumerate(records):
        yield record._replace(row=row)
