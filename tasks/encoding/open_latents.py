"""Opens a stage's latents and texts on a node: fetches their parts and builds the index that the node's ranks share.

    latents, texts (indices of parts) --fetch_part--> local tables [and tensors] --build_index--> HOME/indexes/KEY

With `stream` the tensors are not fetched, and training reads the rows of its batches from the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.files import open_plain
from model.data.files import PREFIX, TextMeta
from model.data.index import INDEX, PartFiles, build_index
from tasks.encoding.flow import TENSORS
from tasks.encoding.ledger import REPORT
from tasks.manifest import load_manifest
from tasks.store import Part, fetch_part, home, read_index

VERSION = 2  # of the file layout of model/data/index.py


def open_latents(latents_dir: str | Path, texts_dir: str | Path, stream: bool = False) -> Path:
    """The directory of the index, which is built if it does not exist. Safe for concurrent processes of one node.

    Raises:
        ValueError: a part has changed, or no record has both a latent and texts.
        FileNotFoundError: a part no longer exists.
    """
    latents_dir, texts_dir = Path(latents_dir), Path(texts_dir)
    digests = [load_manifest(path).digest for path in (latents_dir, texts_dir)]
    content = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    key = hashlib.sha256(json.dumps([VERSION, stream, *digests]).encode()).hexdigest()[:32]
    folder = home() / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / key
    with _locked(folder / f".{key}.lock"):
        texts = {part.name: part for part in read_index(texts_dir) if part.digest}
        pairs = [(part, texts[part.name]) for part in read_index(latents_dir) if part.digest and part.name in texts]
        # Fetching verifies parts. Streamed rows are verified against the index's checksums when they are read.
        if not (index / INDEX).is_file() or not stream:
            parts = [_files(latents, text, stream) for latents, text in pairs]
            prefix = fetch_part(texts[PREFIX])
            if not (index / INDEX).is_file() or not _same_places(index, parts):
                _build(index, parts, prefix, content, _weights(latents_dir))
    return index


def text_settings(texts_dir: str | Path) -> TextMeta:
    """The settings with which the texts of an artifact were encoded."""
    prefix = next(part for part in read_index(texts_dir) if part.name == PREFIX)
    return TextMeta(**json.loads((fetch_part(prefix, TENSORS) / "meta.json").read_text()))


def _files(latents: Part, texts: Part, stream: bool) -> PartFiles:
    without = TENSORS if stream else ()
    local = [str(fetch_part(part, without)) for part in (latents, texts)]
    tensors = [part.uri or path for part, path in zip((latents, texts), local, strict=True)] if stream else local
    return PartFiles(*local, *tensors)


def _weights(latents_dir: Path) -> dict[str, float]:
    fractions: dict[str, Any] = json.loads((latents_dir / REPORT).read_text()).get("fractions", {})
    return {tier: 1 / fraction for tier, fraction in fractions.items() if 0 < fraction < 1}


def _same_places(index: Path, parts: list[PartFiles]) -> bool:
    known = json.loads((index / "parts.json").read_text())["parts"]
    return known == [part._asdict() for part in parts]


def _build(index: Path, parts: list[PartFiles], prefix: Path, content: str, weights: dict[str, float]) -> None:
    temporary = index.with_name(f".building-{index.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    build_index(temporary, parts, prefix, content, weights)
    shutil.rmtree(index, ignore_errors=True)
    os.replace(temporary, index)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
