"""The work of curation's tasks, without Flyte: each step over its shards, in parts that are made once.

`curate_source` runs all steps in one process, as `python -m tasks.curation.check` and the tests do.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model import storage
from model.logs import get_logger
from tasks.curation import caption_check, ledger, takedown
from tasks.curation.captioning import build_captioner, identity, run, steps
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.curated import CORPUS
from tasks.curation.decisions import covers, decide, selections
from tasks.curation.journal import Journal
from tasks.curation.scoring import score
from tasks.curation.scoring.scored_shard import Resources, ShardScores
from tasks.curation.sources import base
from tasks.curation.sources.base import Shard
from tasks.envs import CACHE_VERSIONS
from tasks.manifest import MANIFEST, load_manifest
from tasks.store import (
    INDEX,
    LOCATIONS,
    Part,
    fetch_part,
    group_range,
    home,
    make_part,
    make_sealed,
    num_groups,
    read_index,
    store,
    write_index,
)

logger = get_logger(__name__)

REPORT_PAGE = "report.html"
# The location of shards is not part of a corpus's content: its tables are sealed as logs, and corpus.json has their
# digest.
CORPUS_DIGEST = "corpus.json"
CORPUS_LOGS = (base.SHARDS_TABLE, base.REPORT)
# The reports also name files of the source that are no images: one more of them must not train anything again.
CURATED_LOGS = (LOCATIONS, base.REPORT, REPORT_PAGE, *(f"{CORPUS}/{name}" for name in CORPUS_LOGS))


def make_shard(config: SourceConfig, index: int) -> Part:
    """Makes a shard of a made source, as a `records` part."""
    deciding = MADE_BY | ({"made"} if config.made else set())
    inputs = {"source": config.model_dump(mode="json", include=deciding), "shard": index}
    return attempt(
        "records",
        f"{index:05d}",
        lambda name: make_part(
            "records",
            name,
            CACHE_VERSIONS["records"],
            inputs,
            lambda out: int(base.write_made_shard(config, index, out)["images"]),
            config=inputs,
        ),
    )


MADE_BY = {"scenes", "scene_size_px", "defect_fraction", "digits", "shards", "seed"}  # and `made`, if it is set


def write_corpus(
    config: SourceConfig, path: str, made: Sequence[Part], out_dir: Path, listing_dir: Path | None = None
) -> dict:
    """Writes the table of a user's shards at `path`, or of the `made` parts; returns its report.

    Args:
        listing_dir: the list of URLs from which the parts were downloaded.

    Raises:
        ValueError: an error that the scan finds, or a part that could not be made.
    """
    check_made(made)
    if listing_dir is not None:
        from tasks.curation.sources.urls import shards

        directories = [fetch_part(part, without=(".tar", f"{part.name}.parquet")) for part in made]
        listing, _ = shards.read_listing(listing_dir)
        report = shards.write_corpus(directories, [part.uri for part in made], listing, out_dir)
    elif path:
        report = base.write_corpus(config, path, out_dir)
        if base.is_image(report["alone"] or ""):  # its caption would not be read, and one image is too few for training
            raise ValueError(f"source {path!r} is one image; give the folder of the images and their captions")
    else:
        # Only the tables of a shard are needed here; scoring reads its tar.
        directories = [fetch_part(part, without=(".tar",)) for part in made]
        report = base.made_corpus(directories, out_dir, [part.uri for part in made])
    (out_dir / CORPUS_DIGEST).write_text(json.dumps({"digest": report["digest"]}) + "\n")
    return report


def write_listing(config: SourceConfig, path: str, out_dir: Path, needs_captions: bool = True) -> dict:
    """Lists the tables of URLs at `path`; see urls.shards.write_listing.

    Raises:
        ValueError: no path, or no table of URLs there.
    """
    from tasks.curation.sources.urls import shards

    if not path:
        raise ValueError("source.urls needs tables of URLs: set source.path, or give --source")
    return shards.write_listing(config, path, out_dir, needs_captions)


def download_group(listing_dir: Path, config: SourceConfig, group: int, groups: int) -> list[Part]:
    """Downloads the shards of one group of a list of URLs, as `records` parts."""
    from tasks.curation.sources import file_trees
    from tasks.curation.sources.urls import shards

    report, listed = shards.read_listing(listing_dir)
    place = file_trees.at(report["root"], report["alone"])
    return [_download(place, *listed[i], config) for i in group_range(group, groups, len(listed))]


def _download(place, chosen, name: str, config: SourceConfig) -> Part:
    from tasks.curation.sources.urls import shards

    assert config.urls is not None
    inputs = {"shard": name}  # from the table's content and the settings: urls/shards.shard_name
    work_dir = home() / "runs" / f"urls-{name}"

    def make(out: Path) -> int:
        return shards.write_shard(place, chosen, name, config, work_dir, out)

    part = attempt(
        "records",
        name,
        lambda part: make_part(
            "records", part, CACHE_VERSIONS["urls"], inputs, make, config=inputs | {"urls": config.urls.content()}
        ),
    )
    if not part.error:
        shutil.rmtree(work_dir, ignore_errors=True)
    return part


def check_made(parts: Sequence[Part]) -> None:
    """
    Raises:
        ValueError: a shard could not be made.
    """
    for part in parts:
        if part.error:
            raise ValueError(f"shard {part.name} of the source could not be made: {part.error}")


def check_size(images: int, config: CurationConfig) -> None:
    """Refuses, before scoring, a number of images whose near duplicates could not be searched.

    Raises:
        ValueError: see covers.plan_cover.
    """
    covers.plan_cover(images, config.dedup.max_hamming_distance)


def check_captions(corpus_dir: Path, config: CurationConfig) -> None:
    """Refuses, before any image is decoded, a source of which captions or unreadable files leave no record.

    Raises:
        ValueError: see `result_line`.
    """
    decision = decide_without_pixels(corpus_dir, config)
    if decision is not None:
        result_line(fetch_part(decision), decision, config)


def decide_without_pixels(corpus_dir: Path, config: CurationConfig) -> Part | None:
    """The decision that rejects every record, if captions and problems of the source suffice for it; else None."""
    config = config if config.captioner is None else config.before_captions()
    parts = caption_check.score_without_pixels(base.open_corpus(corpus_dir), config)
    return None if not parts else decide_corpus(corpus_dir, [_index("scores", parts)], config, 1)


def score_group(
    corpus_dir: Path, config: CurationConfig, group: int, groups: int, resources: Resources | None = None
) -> list[Part]:
    """The score parts of the shards of one group; makes missing ones.

    Args:
        resources: "shard" runs only scorers without a GPU, and returns measured parts if others remain to run;
            "gpu_single" and None run all remaining scorers.
    """
    corpus = base.open_corpus(corpus_dir)
    shards = list(corpus.shards())
    return [score_shard(corpus, shards[i], config, resources) for i in group_range(group, groups, len(shards))]


def score_shard(corpus, shard: Shard, config: CurationConfig, resources: Resources | None = None) -> Part:
    def make(name: str) -> Part:
        return ShardScores(corpus, shard, config).make(resources)

    return attempt("scores", shard.shard_id, make, for_artifacts=corpus.without_location)


def attempt(kind: str, name: str, make, for_artifacts: Callable[[str], str] = str) -> Part:
    """The part, or a part with the error, so that one shard does not stop the others of its group.

    Args:
        for_artifacts: the error as artifacts have it, which do not depend on the location of the source.

    Raises:
        OSError: the disk is full: the others would fail as well.
    """
    try:
        return make(name)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        logger.warning(f"{kind} of shard {name} failed: {text}")
        return Part(name, kind, error=for_artifacts(text))


def draft_corpus(corpus_dir: Path, indices: Sequence[Path | None], config: CurationConfig, groups: int) -> Part:
    """The decision before captioning: which images are described, and their tiers. See `decide_corpus`."""
    return decide_corpus(corpus_dir, indices, config.before_captions(), groups)


def caption_group(corpus_dir: Path, draft: Part, config: CurationConfig, group: int, groups: int) -> list[Part]:
    """The captions parts of the shards of one group; makes missing ones."""
    assert config.captioner is not None
    corpus = base.open_corpus(corpus_dir)
    directory = fetch_decision(draft, group, groups)
    kept = pq.read_table(directory / decide.GROUPS / f"{group:05d}.parquet")
    duplicates = pq.read_table(directory / steps.DUPLICATES / f"{group:05d}.parquet")
    shards = {shard.shard_id: shard for shard in corpus.shards()}
    captioner = build_captioner(config.captioner)
    parts = []
    try:
        for scores in read_index(directory / decide.SCORES_INDEX / f"{group:05d}"):
            if scores.error:
                parts.append(Part(scores.name, "captions", error=scores.error))
                continue
            described, left_out = (
                table.filter(pc.equal(table["shard"], scores.name)).select(list(columns))
                for table, columns in ((kept, run.KEPT_COLUMNS), (duplicates, run.DUPLICATE_COLUMNS))
            )
            shard = shards[scores.name]
            parts.append(_caption_shard(corpus, shard, scores, described, left_out, config, captioner))
    finally:
        captioner.close()
    return parts


def _caption_shard(
    corpus, shard: Shard, scores: Part, kept: pa.Table, duplicates: pa.Table, config: CurationConfig, captioner
) -> Part:
    asking = config.captioner
    assert asking is not None
    name, max_pixels = identity(asking), config.filters.max_pixels
    inputs = {
        "scores": scores.digest,
        "kept": decide.digest_of_table(kept),
        "duplicates": decide.digest_of_table(duplicates),
        "captioner": asking.content(),
        "identity": name,
    }

    def make(out: Path) -> int:
        directory = fetch_part(scores, without=(score.THUMBNAILS_TABLE,))
        # Beside the parts, not in them: an answer stays valid until its own question changes.
        with Journal(storage.join(store(), "journals", "captions", shard.shard_id)) as journal:
            return run.caption_shard(
                corpus, shard, directory, kept, duplicates, asking, captioner, name, max_pixels, journal, out
            )

    return attempt(
        "captions",
        scores.name,
        lambda part: make_part(
            "captions", part, CACHE_VERSIONS["captions"], inputs, make, [scores.as_parent()], inputs
        ),
        for_artifacts=corpus.without_location,
    )


def decide_corpus(corpus_dir: Path, indices: Sequence[Path | None], config: CurationConfig, groups: int) -> Part:
    """The decision about a corpus, as a part.

    Args:
        indices: for each group the index of its score parts; None if its task failed.

    Raises:
        ValueError: more shards failed than min_success_ratio allows; the others are kept, so that the same command
            scores only the failed ones again.
    """
    corpus = base.open_corpus(corpus_dir)
    shards = list(corpus.shards())
    parts = list(_score_parts(shards, indices))
    if config.takedown is not None:
        parts = takedown.remove(parts, takedown.read_list(config.takedown))
    failed = [part for part in parts if part.error]
    done = "described" if any(part.kind == "captions" for part in parts) else "scored"
    if len(failed) > (1 - config.min_success_ratio) * len(parts):
        uris = {shard.shard_id: shard.uri for shard in shards}
        few = "; ".join(f"{uris[part.name]}: {part.error}" for part in failed[:3])
        raise ValueError(
            f"{len(failed)} of {len(parts)} shards could not be {done} (curation.min_success_ratio="
            f"{config.min_success_ratio:g}): {few}. Run again for these alone"
        )
    names = {shard.shard_id: corpus.locator(shard) for shard in shards}
    scan = corpus.account()
    inputs = {
        "corpus": load_manifest(corpus_dir).digest,
        "scores": decide.digest_of_parts(parts),
        "account": base.digest_of(scan.to_json()),  # no part of the corpus's digest
        "config": config.deciding().model_dump(mode="json"),
        "groups": groups,
    }

    def make(out: Path) -> int:
        kept = decide.decide(parts, scan, config.deciding(), out, groups, names, config.engine)["kept"]
        if not config.captions.required:
            steps.write_duplicates(out, parts, groups)
        return kept

    return make_part(
        "decisions", "decisions", CACHE_VERSIONS["curation"], inputs, make, [corpus_dir], inputs, decide.LOGS
    )


def _score_parts(shards: list[Shard], indices: Sequence[Path | None]) -> Iterator[Part]:
    """One part for each shard, in the corpus's order."""
    for group, index in enumerate(indices):
        members = [shards[i] for i in group_range(group, len(indices), len(shards))]
        if index is None:
            for shard in members:
                yield Part(shard.shard_id, "scores", error="the task of its group did not finish")
            continue
        parts = list(read_index(index))
        if [part.name for part in parts] != [shard.shard_id for shard in members]:
            raise ValueError(f"{index} has the scores of other shards than group {group} of this corpus")
        yield from parts


def fetch_decision(part: Part, group: int, groups: int) -> Path:
    """The decision's directory; fetches only the files of `group` if it is remote."""
    others = [i for i in range(groups) if i != group]
    without = [f"{decide.GROUPS}/{i:05d}.parquet" for i in others]
    without += [f"{steps.DUPLICATES}/{i:05d}.parquet" for i in others]
    without += [f"{decide.SCORES_INDEX}/{i:05d}/{name}" for i in others for name in (INDEX, LOCATIONS)]
    return fetch_part(part, without=(ledger.LEDGER_TABLE, *without))


def result_line(directory: Path, part: Part, config: CurationConfig) -> str:
    """The line that a run prints about its curation.

    Raises:
        ValueError: no record is kept; names the causes, and the paths of ledger and report.
    """
    content = json.loads((directory / base.REPORT).read_text())
    if not content["kept"]:
        why = decide.nothing_left(content, config).removesuffix(".")
        raise ValueError(f"{why}. Ledger and report: {part.uri}")
    line = f"curation: kept {content['kept']} of {content['input']} records"
    rejected = [
        f"{count} x {rule} ({content['examples'][rule]['file']})"
        for rule, count in sorted(content["rejected"].items(), key=lambda item: -item[1])
        if count
    ]
    line += f"; rejected: {', '.join(rejected)}" if rejected else ""
    left_out = content["account"]["left_out"]
    return line + (f"; left out: {left_out}" if left_out else "")


def select_group(decision: Part, config: CurationConfig, group: int, groups: int) -> list[Part]:
    """The selections parts of the shards of one group."""
    directory = fetch_decision(decision, group, groups)
    kept = pq.read_table(directory / decide.GROUPS / f"{group:05d}.parquet")
    parts = []
    for scores in read_index(directory / decide.SCORES_INDEX / f"{group:05d}"):
        if scores.error:
            parts.append(Part(scores.name, "selections", error=scores.error))
            continue
        decided = kept.filter(pc.equal(kept["shard"], scores.name)).select(["row", "tier", "bucket", "extra_captions"])
        parts.append(select_shard(scores, decided, config))
    return parts


def select_shard(scores: Part, decided: pa.Table, config: CurationConfig) -> Part:
    captions = config.captions.model_dump(mode="json")
    inputs = {"scores": scores.digest, "decided": decide.digest_of_table(decided), "captions": captions}

    def make(out: Path) -> int:
        return selections.write_selection(decide.fetch_columns(scores), decided, config.captions, out)

    return attempt(
        "selections",
        scores.name,
        # Sealed without the settings: if a new limit does not change a shard's captions, its digest stays the same.
        lambda name: make_part("selections", name, CACHE_VERSIONS["curation"], inputs, make, [scores.as_parent()]),
    )


def gather_curated(corpus_dir: Path, decision: Part, parts: Iterable[Part], out_dir: Path) -> dict:
    """Writes the curated directory; returns the content of report.json.

    Raises:
        ValueError: selections could not be written.
    """
    directory = fetch_part(decision)
    (out_dir / CORPUS).mkdir()
    for path in sorted(corpus_dir.rglob("*")):
        target = out_dir / CORPUS / path.relative_to(corpus_dir)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.name != MANIFEST:
            shutil.copyfile(path, target)
    for name in (ledger.LEDGER_TABLE, base.REPORT, REPORT_PAGE):
        shutil.copyfile(directory / name, out_dir / name)
    write_index(out_dir, parts)
    content = json.loads((out_dir / base.REPORT).read_text())
    kept = sum(part.rows for part in read_index(out_dir))
    if kept != content["kept"]:
        raise ValueError(f"the selections have {kept} records, the decision has {content['kept']}: run again")
    return content


def curate_source(source: SourceConfig, path: str, config: CurationConfig, until: str = "curated") -> tuple[Path, Part]:
    """All steps in one process, a group for each shard.

    Args:
        path: of the user's own images; "" makes the recipe's.
        until: "captions", "decisions" or "curated".

    Returns:
        the path of the corpus or of the curated directory, and the decision.

    Raises:
        ValueError: the source is refused, or (until "curated") no record is kept.
    """
    listing = None
    if source.urls is not None:
        listing, _, listed = make_sealed(
            "urls", lambda out: write_listing(source, path, out, config.needs_captions), logs=(base.REPORT,)
        )
        groups = num_groups(listed["shards"], config.max_groups)
        made = [part for group in range(groups) for part in download_group(listing, source, group, groups)]
    else:
        made = [] if path else [make_shard(source, index) for index in range(source.shards)]
    corpus_dir, _, report = make_sealed(
        "corpus",
        lambda out: write_corpus(source, path, made, out, listing),
        [part.as_parent() for part in made if not part.error],
        logs=CORPUS_LOGS,
    )
    refused = decide_without_pixels(corpus_dir, config)
    if refused is not None:
        if until != "decisions":
            result_line(fetch_part(refused), refused, config)
        return corpus_dir, refused
    groups = num_groups(report["shards"], config.max_groups)
    indices = [_index("scores", score_group(corpus_dir, config, group, groups)) for group in range(groups)]
    if config.captioner is not None:
        draft = draft_corpus(corpus_dir, indices, config, groups)
        described = [caption_group(corpus_dir, draft, config, group, groups) for group in range(groups)]
        indices = [_index("captions", parts) for parts in described]
        if until == "captions":
            return corpus_dir, draft
    decision = decide_corpus(corpus_dir, indices, config, groups)
    if until == "decisions":
        return corpus_dir, decision
    result_line(fetch_part(decision), decision, config)
    parts = [part for group in range(groups) for part in select_group(decision, config, group, groups)]
    curated_dir, _, _ = make_sealed(
        "curated",
        lambda out: gather_curated(corpus_dir, decision, parts, out),
        [corpus_dir],
        config.deciding(),
        logs=CURATED_LOGS,
    )
    return curated_dir, decision


def _index(kind: str, parts: Sequence[Part]) -> Path:
    return make_sealed(kind, lambda out: write_index(out, parts), logs=(LOCATIONS,))[0]
