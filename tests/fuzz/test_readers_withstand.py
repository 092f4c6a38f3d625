"""Three seconds of fuzzing, and hostile inputs that take less than a second each. benchmarks/curation/hostile.py
runs all of them, and fuzz_readers.py runs for hours."""

import sys
from pathlib import Path

import pytest

from tasks.curation.scoring import blocks, decode_memory, decoding
from tasks.curation.scoring.workers import Workers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "benchmarks" / "curation")]

import fuzz_readers  # noqa: E402
import hostile  # noqa: E402


def test_changed_inputs_are_read_or_refused_in_one_sentence(tmp_path):
    counts = fuzz_readers.run(seconds=3, kinds=list(fuzz_readers.KINDS), keep=tmp_path)
    assert counts["read"] and counts["refused"]


@pytest.mark.parametrize(
    "kind",
    ["long_name_1_gib", "pax_header_1_gib", "gzip_bomb", "parquet_dictionary", "parquet_nested_1000", "parquet_page_of_128_mib",
     "metadata_jsonl_of_10_gib", "links_pipes_and_sockets", "sites_redirects_inside", "image_png_of_text", "image_png_of_one_row"],
)  # fmt: skip
def test_hostile_inputs_stay_within_memory_and_time(kind):
    outcome = hostile.measure(kind)
    assert hostile.passes(kind, outcome), outcome


MIB, ANY = 2**20, 10**9
# Seeds of images, and the limit without which each is decoded: (name, module).
LIMITED = {
    "image-cd974e6711": ("MAX_BYTES", decode_memory),  # PNG, RGBA
    "image-92a45c3a22": ("MAX_BYTES", decode_memory),  # lossy WebP
    "image-d2f6fef5df": ("MAX_BYTES", decode_memory),  # lossless WebP
    "image-33ef3fa9d6": ("MAX_BYTES", decode_memory),  # JPEG 2000
    "image-850f30e68b": ("MAX_SCANS", blocks),
    "image-71ffaa8bf2": ("MAX_SEGMENTS", blocks),  # JPEG, 5,000 empty comments
    "image-e2b0eb1162": ("MAX_COMPRESSED", blocks),  # PNG, 257 profiles
    "image-e51efdb8e3": ("MAX_COMMENTS", blocks),  # PPM, 1,001 comments
    "image-72c4812f9a": ("MAX_HEADER_BYTES", blocks),  # PPM
}


def address_space_mib() -> float:
    """The most that this process has reserved, whether or not it was written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak:")) / 1024


def reserve_and_end(data: bytes) -> tuple[float, str]:
    before = address_space_mib()
    try:
        decoding.decode(data, ANY)
        ended = "read"
    except ValueError as error:
        ended = str(error)
    return address_space_mib() - before, ended


def outcome(data: bytes) -> tuple[float, str]:
    """(MiB that decoding reserved in a separate process, "read" or why not)."""
    decoding.decodable()
    with Workers(reserve_and_end, 1) as workers:
        ((_, result),) = workers.map([(0, data)])
    return result


@pytest.mark.fresh_process
@pytest.mark.parametrize("seed", LIMITED)
def test_a_seed_that_a_limit_refuses_is_read_or_takes_hundreds_of_mib_without_the_limit(seed, monkeypatch):
    name, module = LIMITED[seed]
    data = (fuzz_readers.SEEDS / seed).read_bytes()
    reserved, ended = outcome(data)
    assert ended != "read" and reserved < 64
    monkeypatch.setattr(module, name, 2**60)
    reserved, ended = outcome(data)
    assert ended == "read" or reserved > 256  # what this process has freed is used first and does not count
