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

import pyarrow as pa

from model.plan.data_costs import Corpus
from tasks.curation.captioning import chosen_captioner
from tasks.curation.config import TIERS, CaptionerConfig, CurationConfig
from tasks.curation.decisions import covers
from tasks.curation.decisions.pairs import PIECE_ROWS
from tasks.curation.scorers import COLUMNS, Chosen, chosen_scorers, costs
from tasks.envs import PROFILE, TIMEOUTS
from tasks.store import num_groups

CAPTIONS_PER_IMAGE = Corpus.captions / Corpus.images  # the paper's
DECODERS = 4  # processes that decode in a task: see workers.Workers
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
    piece_us: float = 0.013  # of a core: a hash read again for one more piece of a sort
    scores_bytes: float = 220.0  # of a row of scores, on disk
    tables_bytes: float = 545.0  # of a record while DuckDB decides, on disk: tables, what is spilled, decisions
    thumbnail_bytes: float = 64 * 85 * 3  # of 4:3 with a shorter side of 64 px, without compression
    embedding_components: int = 1152  # of SigLIP-2 so400m, float16
    caption_parameters: float = 8.2e9  # Qwen3-VL-8B's language model: 2 FLOPs each, for each token
    prompt_tokens: float = 60.0  # assumed
    tokens_per_word: float = 1.4  # assumed
    bytes_per_word: float = 6.0  # of English text
    gpu_flops_per_s: float = 989e12  # H100, bf16, dense
    scoring_utilisation: float = 0.4  # assumed
    caption_utilisation: float = 0.15  # assumed: mostly decoding


def within(count: float, distance: int) -> float:
    """Pairs of `count` random 64-bit hashes within a distance."""
    return count**2 / 2 * sum(math.comb(64, k) for k in range(distance + 1)) / 2**64


@dataclass(frozen=True)
class Task:
    """The longest of one kind of sub-task: its hours, and the limit after which Flyte ends it."""

    name: str
    hours: float
    limit_hours: float


def tasks_of(corpus: Corpus, config: CurationConfig, rates: Rates) -> list[Task]:
    """Time of the sub-tasks that process a group of images. A scorer without a known cost counts as nothing."""
    images = corpus.images / num_groups(corpus.shards, config.max_groups)
    decode_ms = rates.measure_ms / DECODERS
    tasks = {"score_group": decode_ms}
    for one in chosen_scorers(config.scorers):
        name = "score_group_on_gpu" if one.spec.resources == "gpu_single" else "score_group"
        tasks.setdefault(name, decode_ms)
        tasks[name] += 1e3 * (_seconds(one, corpus, rates) or 0.0)
    limits = {"score_group": "shard", "score_group_on_gpu": "gpu_single"}
    found = [Task(name, images * ms / 3.6e6, _limit_hours(limits[name])) for name, ms in tasks.items()]
    if config.captioner is not None and chosen_captioner(config.captioner).needs == "gpu":
        hours = images * _caption_seconds(config.captioner, rates) / 3600
        found.append(Task("caption_group_gpu", hours, _limit_hours("gpu_single")))
    if config.engine == "duckdb":
        found.append(Task("decide_corpus", _deciding_hours(corpus, config, rates), _limit_hours("gather")))
    return found


def _deciding_hours(corpus: Corpus, config: CurationConfig, rates: Rates) -> float:
    """Of a core, with DuckDB."""
    cover = covers.plan_cover(int(corpus.images), config.dedup.max_hamming_distance)
    rows, pairs = 2 * len(cover.keys) * corpus.images, 2 * cover.pairs(corpus.images)
    again = rows * (math.ceil(corpus.images / PIECE_ROWS) - 1)
    us = corpus.images * rates.decide_us + rows * rates.join_us + again * rates.piece_us + pairs * rates.compare_us
    return us / 3.6e9


def _deciding_bytes(corpus: Corpus, config: CurationConfig, rates: Rates) -> float:
    """On the disk of one task: the scores that it fetches, and what DuckDB writes."""
    compared = 4.0 * rates.embedding_components if config.dedup.min_embedding_similarity is not None else 0.0
    return corpus.images * (rates.scores_bytes + rates.tables_bytes + compared) + _caption_bytes(corpus, config, rates)


def _caption_bytes(corpus: Corpus, config: CurationConfig, rates: Rates) -> float:
    """Of the captioner's answers, without compression."""
    asking = config.captioner
    return corpus.images * sum(_requests(asking)) * rates.bytes_per_word if asking is not None else 0.0


def _limit_hours(kind: str) -> float:
    return TIMEOUTS[kind].total_seconds() / 3600


def _seconds(one: Chosen, corpus: Corpus, rates: Rates) -> float | None:
    """Of a core or of a GPU, for an image; None if nothing is known of the model."""
    if one.spec.name in costs.CPU_MS:
        return costs.CPU_MS[one.spec.name] / 1e3
    flops = costs.flops(one, corpus.captions / corpus.images)
    return None if flops is None else flops / rates.gpu_flops_per_s / rates.scoring_utilisation


def _written_bytes(one: Chosen, rates: Rates) -> float:
    """Of an image, without compression."""
    sizes = (
        2 * rates.embedding_components if pa.types.is_list(COLUMNS[column].type) else COLUMNS[column].type.bit_width / 8
        for column in one.columns
    )
    return sum(sizes)


def _requests(captioner: CaptionerConfig) -> list[float]:
    """Words of each answer about the mean image, weighted by tier: tiers are taken to be of one size."""
    classes = [captioner.lengths[length] for tier in TIERS for length in captioner.per_tier[tier]]
    return [(length.min_words + length.max_words) / 2 / len(TIERS) for length in classes]


def _caption_seconds(captioner: CaptionerConfig, rates: Rates) -> float:
    """GPU seconds for an image. Each length class is a separate request that includes the image; no prefix cache is assumed."""
    words = _requests(captioner)
    read = (
        captioner.image_px / 32
    ) ** 2 + rates.prompt_tokens  # of a square image: Qwen3-VL has a token for 32 x 32 px
    tokens = len(words) / len(TIERS) * read + sum(words) * rates.tokens_per_word
    return 2 * rates.caption_parameters * tokens / rates.gpu_flops_per_s / rates.caption_utilisation


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
    decoding = images * rates.measure_ms / 3.6e6
    a_group = f"{images / groups:,.0f} images"
    lines = [
        f"{images:,.0f} images of {corpus.image_bytes / 1e3:,.0f} kB in {corpus.shards:,} shards; "
        f"{groups:,} groups of about {corpus.shards / groups:,.0f} shards.",
        "",
        "| step | sub-tasks | each has | reads | writes | core-hours | GPU-hours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def step(
        name: str, tasks: int, each: str, reads: float, writes: float, cores: float = 0, gpus: float | None = 0
    ) -> None:
        hours = ["unknown" if value is None else _hours(value) for value in (cores, gpus)]
        lines.append(f"| {name} | {tasks:,} | {each} | {_tb(reads)} | {_tb(writes)} | {' | '.join(hours)} |")

    pictures, scores = images * corpus.image_bytes, images * rates.scores_bytes
    step("list the corpus", 1, f"{corpus.shards:,} shards", 0, 0)
    step("passes 1 and 2, hashes", groups, a_group, pictures, scores + images * rates.thumbnail_bytes, decoding)
    scorers = chosen_scorers(config.scorers)
    on_gpus = [one for one in scorers if one.spec.resources == "gpu_single"]
    for one in (one for one in scorers if one not in on_gpus):
        hours = images * (_seconds(one, corpus, rates) or 0) / 3600
        step(_row(one), groups, a_group, 0, images * _written_bytes(one, rates), hours)
    if on_gpus:
        step("pass 3: decode again, for GPUs", groups, a_group, pictures, 0, decoding)
    for one in on_gpus:
        seconds = _seconds(one, corpus, rates)
        gpus = None if seconds is None else images * seconds / 3600
        step(_row(one), groups, a_group, 0, images * _written_bytes(one, rates), gpus=gpus)
    engine = "Spark application" if config.engine == "spark" else "DuckDB"
    deciding, described = _deciding_hours(corpus, config, rates), _caption_bytes(corpus, config, rates)
    if config.captioner is not None:
        asking = config.captioner
        gpus = 0.0 if asking.name == "scenes" else images * _caption_seconds(asking, rates) / 3600
        step("decide which images to describe", 1, engine, scores, scores / 2, deciding)
        # Answers are written twice: as they are, and in the scores, which alone are read afterwards.
        step(f"captions ({asking.name})", groups, a_group, pictures + scores, scores + 2 * described, gpus=gpus)
    step("decide", 1, engine, scores + described, scores / 2, deciding)
    step("select", groups, a_group, scores + described, scores / 2 + described)
    step("gather", 1, f"{corpus.shards:,} parts", 0, 0)
    outputs = groups * OUTPUT_BYTES
    lines += [
        "",
        *_limits(corpus, config, rates, groups),
        "",
        f"Near duplicates within {radius} of 64 bits: {keys} keys of {cover.key_bits:.0f} bits for each of two hashes. On Spark the joins "
        f"shuffle {rows:.1e} rows ({_tb(rows * JOIN_ROW_BYTES)} in and out of {2 * keys} shuffles, {_tb(images * JOIN_ROW_BYTES)} each) and "
        f"compare {candidates:.1e} pairs of unrelated hashes; {2 * within(images, radius):.1e} of these are within the radius by "
        "chance, and pHash-256 must distinguish them. The core-hours of deciding are at DuckDB's rates; Spark takes more.",
        "",
        f"An array node of Flyte can have about {MAX_ARRAY_TASKS:,} sub-tasks and {MAX_ARRAY_BYTES / 2**20:.0f} MiB of outputs: {groups:,} "
        f"sub-tasks have at most {outputs / 2**20:.1f} MiB. A map over {corpus.shards:,} shards "
        f"{'would exceed both' if corpus.shards > MAX_ARRAY_TASKS else 'would fit'}.",
    ]
    return lines


def _row(one: Chosen) -> str:
    return f"pass 3: {', '.join(one.columns)} ({one.spec.name})"


def _limits(corpus: Corpus, config: CurationConfig, rates: Rates, groups: int) -> list[str]:
    """How long a sub-task of each kind takes, next to its limit."""
    lines = ["Time of the longest sub-task of each kind, and the limit after which it is ended:", ""]
    for task in tasks_of(corpus, config, rates):
        line = f"- {task.name}: {task.hours:,.1f} h of {task.limit_hours:,.0f} h"
        if task.hours > task.limit_hours:
            needed = math.ceil(groups * task.hours / task.limit_hours)
            line += f". TOO LONG: it needs curation.max_groups of at least {needed:,}"
            if needed > min(MAX_ARRAY_TASKS, corpus.shards):
                line += f", and {min(MAX_ARRAY_TASKS, corpus.shards):,} is the most; choose faster scorers"
        if task.name == "score_group_on_gpu":
            line += f"; {groups * task.hours:,.0f} GPU-hours in all, with the waits for {DECODERS} decoding processes"
        lines.append(line)
    if config.engine == "duckdb":
        lines.append(_space(corpus, config, rates))
    captioner = config.captioner
    if captioner is not None and chosen_captioner(captioner).needs == "cpu" and captioner.name != "scenes":
        hours, limit = corpus.images / groups * _caption_seconds(captioner, rates) / 3600, _limit_hours("captioner")
        lines.append(
            f"- caption_group: {hours:,.1f} GPU-hours of the endpoint; within {limit:,.0f} h it needs {hours / limit:.2f} GPUs for each "
            "sub-task that runs at the time (curation.concurrency)"
        )
    return lines


def _space(corpus: Corpus, config: CurationConfig, rates: Rates) -> str:
    """Disk and memory of the task that decides, next to those of the profile."""
    needed, disk, memory = (
        _deciding_bytes(corpus, config, rates),
        PROFILE.tables.ephemeral_gib,
        PROFILE.tables.memory_gib,
    )
    line = (
        f"- decide_corpus, profile {PROFILE.name}: {_tb(needed)} of {_tb(disk * 2**30)} of disk; half of {memory} GiB for DuckDB's "
        f"buffers, {memory * 2**29 / corpus.images:,.0f} bytes a record"
    )
    if needed > disk * 2**30:
        line += ". TOO LARGE: it needs larger `tables` in tasks/profiles.py, or curation.engine=spark"
    return line


def _hours(value: float) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def _tb(size: float) -> str:
    if size < 1e10:
        return "" if not size else f"{size / 1e9:,.2g} GB"
    return f"{size / 1e12:,.2f} TB" if size < 1e13 else f"{size / 1e12:,.0f} TB"


def main(arguments: Sequence[str] | None = None) -> int:
    from tasks.recipe import load_recipe

    parser = argparse.ArgumentParser(prog="python -m tasks.curation.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="nucleus_17b")
    parser.add_argument("--images", type=float, default=Corpus.images)
    parser.add_argument("--shards", type=int, default=Corpus.shards)
    parser.add_argument("--image-bytes", type=float, default=Corpus.image_bytes)
    options = parser.parse_args(arguments)
    try:
        corpus = Corpus(
            images=options.images,
            captions=options.images * CAPTIONS_PER_IMAGE,
            shards=options.shards,
            image_bytes=options.image_bytes,
        )
        lines = plan(corpus, load_recipe(options.recipe).curation, Rates())
    except ValueError as error:
        print(f"ValueError: {error}")
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
