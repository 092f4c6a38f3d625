"""Parses captions: text of any detectable encoding, JSON, and cells of tables.

A caption is read whole or not at all: if it cannot be decoded or parsed, it is a `CaptionError`, never a shorter text.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tasks.curation.sources.base import CAPTION_COLUMNS, UNREADABLE_CAPTION, Options, extension, visible
from tasks.curation.sources.captions.csv_text import few

SIDECAR_EXTENSIONS = ("txt", "text", "caption", "prompt", "json")
MAX_TEXT_BYTES, MAX_JSON_BYTES = 2**20, 4 * 2**20
_MARKS = (  # longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class CaptionError(ValueError):
    """A caption cannot be read; the message does not name its file."""


class NotTextError(CaptionError):
    """A caption that is not text, such as a number. It is an error only if the image has no other caption."""


def decode(data: bytes, encoding: str | None) -> str:
    """Decodes text by its byte order mark, else as UTF-8, else as `encoding`.

    Raises:
        CaptionError: it is in none of these, or has control characters of another encoding (`foreign`).
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            try:
                return _checked(data[len(mark) :].decode(name))
            except UnicodeError as error:
                raise CaptionError(f"has the mark of {name} and is none: {error}") from error
    try:
        return _checked(data.decode("utf-8"))
    except UnicodeError as error:
        why = f"is not UTF-8 (byte {error.start + 1})" if isinstance(error, UnicodeDecodeError) else f"{error}"
        if encoding is None:
            raise CaptionError(f"{why}; save it as UTF-8, or name its encoding in source.encoding") from error
    try:
        return _checked(data.decode(encoding))
    except UnicodeError as error:
        raise CaptionError(f"is neither UTF-8 nor source.encoding={encoding}; save it as UTF-8") from error


def foreign(text: str) -> str:
    """Says, from its control characters, that a text was decoded with the wrong encoding; "" if not."""
    if "\0" in text:
        return "has NUL characters, as UTF-16 without a byte order mark does"
    if "\x1b" in text:
        return "has escape characters, as ISO-2022-JP and terminals use them"
    return ""


def _checked(text: str) -> str:
    if why := foreign(text):
        raise UnicodeError(why)
    return text


def column_name(name: str) -> str:
    """A column's name without case and outer blanks, for comparisons."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def caption_columns(columns: Iterable[str], wanted: tuple[str, ...]) -> list[str]:
    """The caption columns among `columns`, in the order of `wanted` (of the default names, if it is empty)."""
    by_name: dict[str, list[str]] = {}
    for column in columns:
        by_name.setdefault(column_name(column), []).append(column)
    names = dict.fromkeys(column_name(name) for name in wanted or CAPTION_COLUMNS)
    return [column for name in names for column in by_name.get(name, ())]


def column_hint(wanted: tuple[str, ...]) -> str:
    names = ", ".join(wanted or CAPTION_COLUMNS)
    return f"a caption column ({names}); name yours in source.caption_columns"


def captions_of(value: Any) -> list[str]:
    """Captions in a string or a list of strings; null and NaN are none.

    Raises:
        NotTextError: a value of another kind.
        CaptionError: a lone surrogate, which JSON can contain but Unicode text cannot; or characters of `foreign`.
    """
    texts = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if text is None or text != text:  # pandas writes a missing text as NaN
            continue
        if not isinstance(text, str):
            raise NotTextError(f"has a caption that is not text but of the type {type(text).__name__}")
        if not text.strip():
            continue
        try:
            _checked(text).encode("utf-8")
        except UnicodeError as error:
            raise CaptionError(f"has a caption that is no Unicode text ({error})") from error
        texts.append(text.strip())
    return list(dict.fromkeys(texts))


def row_captions(row: dict[str, Any], wanted: tuple[str, ...]) -> list[str]:
    """The captions of a row or JSON object, column by column.

    Raises:
        CaptionError: see `captions_of`.
    """
    return captions_of_cells(row[column] for column in caption_columns(row, wanted))


def captions_of_cells(cells: Iterable[Any]) -> list[str]:
    """The captions of all cells of one image.

    Raises:
        NotTextError: a cell is not text, and no other cell has a caption.
        CaptionError: see `captions_of`.
    """
    texts: list[str] = []
    not_text: NotTextError | None = None
    for cell in cells:
        try:
            texts += captions_of(cell)
        except NotTextError as error:
            not_text = error
    if not_text and not texts:
        raise not_text
    return list(dict.fromkeys(texts))


def sidecar_captions(name: str, data: bytes, encoding: str | None, wanted: tuple[str, ...]) -> list[str]:
    """The captions of a file next to an image: one per line in .txt and .caption; a row or a list in .json.

    Raises:
        CaptionError: it cannot be read, or is over its limit.
    """
    is_json = extension(name) == "json"
    limit = MAX_JSON_BYTES if is_json else MAX_TEXT_BYTES
    if len(data) > limit:
        raise CaptionError(f"is larger than {limit // 2**20} MiB")
    text = decode(data, encoding)
    if not is_json:
        return captions_of(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    try:
        value = parse_json(text)
    except ValueError as error:
        raise CaptionError(f"is not JSON: {visible(str(error))}") from error
    return row_captions(value, wanted) if isinstance(value, dict) else captions_of(value)


def add_texts(
    texts: Iterable[tuple[str, str, Callable[[], bytes]]],
    captions: Iterable[str],
    problem: str,
    detail: str,
    options: Options,
) -> tuple[list[str], str, str]:
    """Reads the text files of an image.

    Args:
        texts: (name, name for messages, function that reads it) of each; the function may raise CaptionError.
        captions, problem, detail: of the record without them. A detail without a problem says why it has no captions.

    Returns:
        captions, problem and detail of the record. A detail without a problem says why there is no caption.
    """
    found, not_text, no_column = list(captions), "", ""
    for name, shown, read in texts:
        try:
            data = read()
            own = sidecar_captions(name, data, options.encoding, options.caption_columns)
            found += own
            if not own and (why := _without_column(name, data, options)):
                no_column = f"{shown} {why}"
        except NotTextError as error:
            not_text = f"{shown} {error}"
        except CaptionError as error:
            problem, detail = UNREADABLE_CAPTION, f"{shown} {error}"
    if not_text and not found and not problem:
        problem, detail = UNREADABLE_CAPTION, not_text
    if not problem:
        detail = "" if found else no_column or detail
    return found, problem, detail


def _without_column(name: str, data: bytes, options: Options) -> str:
    """Names the keys of a readable .json file next to an image that has none for captions; "" for other files."""
    if extension(name) != "json":
        return ""
    value = parse_json(decode(data, options.encoding))
    if not isinstance(value, dict) or caption_columns(value, options.caption_columns):
        return ""
    return f"has {few(list(value)) or 'nothing'}; it needs {column_hint(options.caption_columns)}"


def parse_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {visible(twice)!r} twice")
    return value
