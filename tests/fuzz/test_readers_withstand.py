"""Three seconds of fuzzing, and hostile inputs that take less than a second each. benchmarks/curation/hostile.py
runs all of them, and fuzz_readers.py runs for hours."""

import sys
from pathlib import Path

import pytest

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
