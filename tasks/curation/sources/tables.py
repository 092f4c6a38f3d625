"""Tables with image bytes (Parquet, Arrow): finds their columns and converts rows to records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.types as types

from tasks.curation.sources.base import (
    MAX_IMAGE_BYTES,
    UNREADABLE_CAPTION,
    UNREADABLE_FILE,
    Account,
    Record,
    extension,
    is_image,
    record_key,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_TEXT_BYTES,
    CaptionError,
    caption_columns,
    captions_of_cells,
    column_hint,
    column_name,
    decode,
)
from tasks.curation.sources.captions.csv_text import few

IMAGE_COLUMNS = ("image", "images", "image_bytes", "img", "jpg", "jpeg", "png", "webp")
NO_BYTES, SEVERAL = "row without image bytes", "row with several images"
FURTHER = "further column of images"


class Columns(NamedTuple):
    """image: the column of image bytes, structs of bytes and path, or lists of these. captions: the caption columns.
    no_captions: why there are none, or ""."""

    image: str
    captions: list[str]
    no_captions: str


def columns_of(schema: pa.Schema, wanted: tuple[str, ...]) -> Columns | None:
    """The columns to read; None without a column of image bytes."""
    by_name = {column_name(name): name for name in reversed(schema.names)}
    names = [
        by_name[name] for name in IMAGE_COLUMNS if name in by_name and _has_bytes(schema.field(by_name[name]).type)
    ]
    if not names:
        return None
    captions = [name for name in caption_columns(schema.names, wanted) if name != names[0]]
    no_captions = f"has columns {few(schema.names)}; it needs {column_hint(wanted)}"
    return Columns(names[0], captions, "" if captions else no_captions)


def further_images(schema: pa.Schema) -> list[str]:
    """The columns of image bytes besides the one that is read."""
    columns = columns_of(schema, ())
    names = [
        name for name in schema.names if column_name(name) in IMAGE_COLUMNS and _has_bytes(schema.field(name).type)
    ]
    return [name for name in names if columns is not None and name != columns.image]


def check_columns(shown: str, schema: pa.Schema) -> None:
    """
    Raises:
        ValueError: a column is there twice; names the columns.
    """
    twice, count = Counter(schema.names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{shown} has the column {visible(twice)!r} twice (columns {few(schema.names)})")


def records(
    batch: pa.RecordBatch,
    columns: Columns,
    first_row: int,
    name: str,
    locator: str,
    encoding: str | None,
    account: Account,
) -> Iterator[Record]:
    """Records of the rows of a batch that have an image; other rows are counted.

    Args:
        first_row: the batch's first row in the file.
        name, locator: the file's name inside the source, and its name for messages.
    """
    images = batch.column(columns.image)
    captions = [as_bytes(batch.column(column)) for column in columns.captions]
    for i in range(len(batch)):
        row = first_row + i
        at = f"{locator}:{row}"
        cells = images[i].as_py()
        cells = [cell for cell in cells if cell is not None] if isinstance(cells, list) else [cells]
        if len(cells) > 1:
            account.skip(SEVERAL, at)
            continue
        data, path = _bytes_and_path(cells[0] if cells else None)
        if data is None:
            account.skip(NO_BYTES, at)
            continue
        account.use()
        problem, detail = "", f"{locator} {columns.no_captions}" if columns.no_captions else ""
        texts: list[str] = []
        try:
            texts = captions_of_cells(decoded(column[i].as_py(), encoding) for column in captions)
        except CaptionError as error:
            problem, detail = UNREADABLE_CAPTION, f"{at} {error}"
        ext = extension(path) if is_image(path) else sniffed(data)
        if len(data) > MAX_IMAGE_BYTES:
            problem, detail, data = UNREADABLE_FILE, f"{at} is larger than {MAX_IMAGE_BYTES // 2**20} MiB", b""
        account.records += 1
        yield Record(record_key(name, str(row)), data, ext, texts, "user", at, 0, problem, detail)


def count_without_bytes(images: pa.Array) -> int:
    """Number of cells without image bytes, from null counts. An empty list counts as having bytes."""
    kind = images.type
    if types.is_struct(kind):
        return images.flatten()[kind.get_field_index("bytes")].null_count
    return images.null_count


def sniffed(data: bytes) -> str:
    """Extension from the first bytes, for images without a name; `bin` if the format is unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return {b"avif": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}.get(data[8:12], "bin")
    signs = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
    return next((ext for sign, ext in signs.items() if data.startswith(sign)), "bin")


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str]:
    if isinstance(cell, dict):
        path = cell.get("path")
        return cell.get("bytes"), path if isinstance(path, str) else ""
    return (cell, "") if isinstance(cell, bytes) else (None, "")


def decoded(value: Any, encoding: str | None) -> Any:
    """The text of a cell, or of the cells of a list, that `as_bytes` returned.

    Raises:
        CaptionError: it cannot be decoded, or is over its limit.
    """
    cells = value if isinstance(value, list) else [value]
    if any(isinstance(cell, bytes) and len(cell) > MAX_TEXT_BYTES for cell in cells):
        raise CaptionError(f"has a caption larger than {MAX_TEXT_BYTES // 2**20} MiB")
    return [decode(cell, encoding) if isinstance(cell, bytes) else cell for cell in cells]


def as_bytes(column: pa.Array) -> pa.Array:
    """Strings as bytes: Parquet does not check that they are UTF-8."""
    kind = column.type
    if types.is_dictionary(kind):
        return as_bytes(column.dictionary_decode())
    if _is_text(kind):
        return column.cast(pa.large_binary())
    if _is_list(kind) and _is_text(kind.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    if _is_list(kind) or types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _has_bytes(kind.field(index).type)
    return any(
        is_one(kind)
        for is_one in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    )
