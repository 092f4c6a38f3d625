"""Plans the curation of a large corpus: `python -m tasks.curation.plan --recipe nucleus_17b` (docs/scale.md has its
output).

Sub-tasks, bytes and the shuffle of the dedup join follow from the recipe and from counts. Core-hours are measured rates times
counts; GPU-hours are arithmetic from FLOPs at an assumed utilisation. TB is 1e12 bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from model.plan.data_costs import Corpus
from tasks.curation.config import CurationConfig
from tasks.curation.decisions import covers
from tasks.store import num_groups

JOIN_ROW_BYTES = 24  # bytes: key, hash and position
MAX_ARRAY_TASKS = 5000  # sub-tasks that one array node of Flyte can have
MAX_ARRAY_BYTES = 10 * 2**20  # bytes of its outputs, in the message that gathers them
OUTPUT_BYTES = 1024  # bytes of one sub-task in that message, at most: the URI and type of a directory


@dataclass(frozen=True)
class Rates:
    """Rates per image. docs/scale.md says which were measured, where, and by which command."""

    measure_ms: float = 14.1  # of a core: decode, statistics and hashes of a JPEG of 1024 x 768 px
    decide_us: float = 25.0  # of a core: rules, tiers, duplicates, ledger and report
    join_us: float = 0.2  # of a core: a row of one join of the search for near duplicates
    compare_us: float = 0.17  # of a core: a pair that shares a key, compared
    scores_bytes: float = 193.0  # of a row of scores, on disk
    thumbnail_bytes: float = 64 * 85 * 3  # of 4:3 with a shorter side of 64 px, without compression
    embedding_flops: float = 670e9  # SigLIP-2 so400m, 384 px: 2 x 428e6 parameters x 729 tokens, and attention
    caption_flops: float = 2 * 8.2e9 * (1024 + 300)  # Qwen3-VL-8B: 2 x parameters x (image tokens, prompt and answers)
    gpu_flops_per_s: float = 989e12  # H100, bf16, dense
    embedding_utilisation: float = 0.4  # assumed
    caption_utilisation: float = 0.15  # assumed: mostly decoding


def within(count: float, distance: int) -> float:
    """Pairs of `count` random 64-bit hashes within a distance."""
    return count**2 / 2 * sum(math.comb(64, k) for k in range(distance + 1)) / 2**64


def plan(corpus: Corpus, config: CurationConfig, rates: Rates) -> list[str]:
    """The plan as Markdown.

    Raises:
        ValueError: the radius is too large for near duplicates of so many images.
    """
    corpus.check()
    images = corpus.images
    groups = num_groups(corpus.shards, config.max_groups)
    radius = config.dedup.max_hamming_distance
    cover = covers.plan_cover(int(images), radius)
    keys = len(cover.keys)
    rows, candidates = 2 * keys * images, 2 * cover.pairs(images)
    cores = {
        "score": images * rates.measure_ms / 3.6e6,
        "decide": (images * rates.decide_us + rows * rates.join_us + candidates * rates.compare_us) / 3.6e9,
    }
    seconds = {
        "embed": images * rates.embedding_flops / rates.gpu_flops_per_s / rates.embedding_utilisation,
        "caption": images * rates.caption_flops / rates.gpu_flops_per_s / rates.caption_utilisation,
    }
    a_group = f"{images / groups:,.0f} images"
    lines = [
        f"{images:,.0f} images of {corpus.image_bytes / 1e3:,.0f} kB in {corpus.shards:,} shards; "
        f"{groups:,} groups of about {corpus.shards / groups:,.0f} shards.",
        "",
        "| step | sub-tasks | each has | reads | writes | core-hours | GPU-hours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def step(name: str, tasks: int, each: str, reads: float, writes: float, cores: float = 0, gpus: float = 0) -> None:
        hours = [f"{value:,.0f}" if value else "" for value in (cores, gpus)]
        lines.append(f"| {name} | {tasks:,} | {each} | {_tb(reads)} | {_tb(writes)} | {' | '.join(hours)} |")

    pictures, scores = images * corpus.image_bytes, images * rates.scores_bytes
    step("list the corpus", 1, f"{corpus.shards:,} shards", 0, 0)
    step("passes 1 and 2, hashes", groups, a_group, pictures, scores + images * rates.thumbnail_bytes, cores["score"])
    step("pass 3: embedding", groups, a_group, pictures, images * 2 * 1152, gpus=seconds["embed"] / 3600)
    step("captions", groups, a_group, pictures, corpus.captions * 600, gpus=seconds["caption"] / 3600)
    step("decide", 1, "Spark application", scores, scores / 2, cores["decide"])
    step("select", groups, a_group, scores, scores / 2)
    step("gather", 1, f"{corpus.shards:,} parts", 0, 0)
    outputs = groups * OUTPUT_BYTES
    lines += [
        "",
        f"Near duplicates within {radius} of 64 bits: {keys} keys of {cover.key_bits:.0f} bits for each of two hashes. The joins shuffle "
        f"{rows:.1e} rows ({_tb(rows * JOIN_ROW_BYTES)} in and out of {2 * keys} shuffles, {_tb(images * JOIN_ROW_BYTES)} each) and "
        f"compare {candidates:.1e} pairs of unrelated hashes; {2 * within(images, radius):.1e} of these are within the radius by "
        "chance, and pHash-256 must distinguish them.",
        "",
        f"An array node of Flyte can have about {MAX_ARRAY_TASKS:,} sub-tasks and {MAX_ARRAY_BYTES / 2**20:.0f} MiB of outputs: {groups:,} "
        f"sub-tasks have at most {outputs / 2**20:.1f} MiB. A map over {corpus.shards:,} shards "
        f"{'would exceed both' if corpus.shards > MAX_ARRAY_TASKS else 'would fit'}.",
    ]
    return lines


def _tb(size: float) -> str:
    return "" if not size else f"{size / 1e12:,.2f} TB" if size < 1e13 else f"{size / 1e12:,.0f} TB"


def main(arguments: Sequence[str] | None = None) -> int:
    from tasks.recipe import load_recipe

    parser = argparse.ArgumentParser(prog="python -m tasks.curation.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="nucleus_17b")
    parser.add_argument("--images", type=float, default=Corpus.images)
    parser.add_argument("--shards", type=int, default=Corpus.shards)
    parser.add_argument("--image-bytes", type=float, default=Corpus.image_bytes)
    options = parser.parse_args(arguments)
    try:
        corpus = Corpus(images=options.images, shards=options.shards, image_bytes=options.image_bytes)
        lines = plan(corpus, load_recipe(options.recipe).curation, Rates())
    except ValueError as error:
        print(f"ValueError: {error}")
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
