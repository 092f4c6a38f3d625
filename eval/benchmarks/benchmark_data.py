"""The official prompt files, downloaded when they are needed, at the commit from which the rule was taken.

This package contains none of them: licences differ (GenEval MIT, ELLA Apache-2.0, OneIG-Bench none stated, GenEval 2
CC BY-NC). Files that exist are not downloaded again.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.files import replacing

MAX_BYTES = 64 << 20
TIMEOUT_S = 60
ONEIG_CLASSES = ("anime", "human", "object")
Read = Callable[[str], bytes]


class Source(NamedTuple):
    """Files of a GitHub repository at a commit. `prompts`: the file that `Benchmark.prompts` reads, "" for the
    folder."""

    repository: str
    commit: str
    files: dict[str, str | None]  # path -> SHA-256, if it is known
    prompts: str


def _oneig(suffix: str, table: str, classes: tuple[str, ...]) -> Source:
    names = [table, f"scripts/text/text_content{suffix}.csv", "scripts/style/style.csv"]
    names += [f"scripts/reasoning/gt_answer{suffix}.json"]
    names += [f"scripts/alignment/Q_D/{name}{suffix}.json" for name in classes]
    commit = "41b49831e79e6dde5323618c164da1c4cf0f699d"
    return Source("OneIG-Bench/OneIG-Benchmark", commit, dict.fromkeys(names), "")


ENGLISH = _oneig("", "OneIG-Bench.csv", ONEIG_CLASSES)
CHINESE = _oneig("_zh", "OneIG-Bench-ZH.csv", (*ONEIG_CLASSES, "multilingualism"))
GENEVAL_PROMPTS, DPG_PROMPTS = "prompts/evaluation_metadata.jsonl", "dpg_bench/dpg_bench.csv"
SOURCES = {
    "geneval": Source(
        "djghosh13/geneval",
        "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        {GENEVAL_PROMPTS: "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"},
        GENEVAL_PROMPTS,
    ),
    "dpg": Source("TencentQQGYLab/ELLA", "3c228f1dc6c4d3cad0a47493816151a419f14db3", {DPG_PROMPTS: None}, DPG_PROMPTS),
    "geneval2": Source(
        "facebookresearch/GenEval2",
        "c088ab7f65a38ce87f2c5d0ae28bf65bd5ba37b0",
        {"geneval2_data.jsonl": None},
        "geneval2_data.jsonl",
    ),
    "oneig": ENGLISH,
    "oneig-text": ENGLISH,
    "oneig-zh": CHINESE,
    "oneig-text-zh": CHINESE,
}


def default_folder() -> Path:
    """The folder of downloaded prompt files: NUCLEUS_HOME (default .nucleus)/benchmarks."""
    return Path(os.environ.get("NUCLEUS_HOME", ".nucleus")) / "benchmarks"


def download(benchmark: str, folder: str | Path | None = None, read: Read | None = None) -> Path:
    """The path for `Benchmark.prompts`, downloaded into `folder`/BENCHMARK-COMMIT unless it exists.

    Args:
        benchmark: a name in `SOURCES`.
        folder: see `default_folder`.
        read: content of a URL.

    Raises:
        ValueError: a file cannot be downloaded, or has another SHA-256 than the recorded one.
    """
    source = SOURCES[benchmark]
    read = read or read_url
    place = Path(folder or default_folder()) / f"{source.repository.rpartition('/')[2]}-{source.commit[:12]}"
    for name, sha256 in source.files.items():
        path = place / name
        if path.is_file():
            _check(path.read_bytes(), sha256, str(path))
            continue
        url = f"https://raw.githubusercontent.com/{source.repository}/{source.commit}/{name}"
        try:
            content = read(url)
        except (OSError, urllib.error.URLError) as error:
            raise ValueError(
                f"the prompts of {benchmark} cannot be downloaded from {url} ({error}); download them elsewhere and set "
                f"prompts_file to {source.prompts or 'a checkout of the repository'}"
            ) from error
        _check(content, sha256, url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return place / source.prompts if source.prompts else place


def read_url(url: str) -> bytes:
    """
    Raises:
        OSError: it cannot be read, or has more than `MAX_BYTES`.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310  (https of SOURCES alone)
        content = answer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"more than {MAX_BYTES >> 20} MiB")
    return content


def _check(content: bytes, sha256: str | None, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{where} has the SHA-256 {digest}, and the benchmark's file has {sha256}: remove it")
