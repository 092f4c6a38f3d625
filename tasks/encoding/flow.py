"""Encodes groups of shards, without Flyte: one part per shard, reused if its inputs are unchanged, and an index of parts.

    curated, components --group--> texts parts, latents parts --gather--> index: parts.parquet, encoding_ledger, report

The index contains references, no copies of the parts. If a shard fails, the others of its group are still encoded; then the
group raises an error that names the failed shards, and a retry encodes only those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.config import StageConfig
from model.data.files import PREFIX
from model.logs import get_logger
from tasks import envs
from tasks.curation.curated import Curated, images_by_tier, open_curated
from tasks.curation.ledger import LEDGER, LEDGER_TABLE
from tasks.encoding import latents
from tasks.encoding.config import EncodingConfig
from tasks.encoding.fractions import drawn_fractions
from tasks.encoding.images import ChangedRecords
from tasks.encoding.ledger import HELD_OUT, NOT_DRAWN, REPORT, SHARD_FAILED, add_up
from tasks.encoding.report import PAGE, page, title
from tasks.encoding.text import texts
from tasks.encoding.text.prompts import PromptEncoder
from tasks.store import LOCATIONS, Part, fetch_part, group_range, make_part, num_groups, read_index, write_index

logger = get_logger(__name__)

TENSORS = (".safetensors",)
ENCODING_LEDGER = "encoding_ledger.parquet"
TEXT_KEYS = ("dtype", "max_text_tokens", "hidden_state_index", "text")
LOGS = (LOCATIONS, PAGE)  # files that are not part of the artifact's digest
LATENT_KEYS = ("dtype", "rows_per_file", "shapes", "max_crop_fraction", "batch_size")


def list_groups(curated_dir: str | Path, max_groups: int) -> list[int]:
    """The numbers of the groups for the map tasks."""
    return list(range(num_groups(sum(1 for _ in open_curated(curated_dir).parts()), max_groups)))


def encode_texts_group(
    curated_dir: str | Path, components_dir: Path, config: EncodingConfig, group: int, groups: int, out_dir: Path
) -> dict[str, Any]:
    """Encodes the texts of one group of shards and writes the index of their parts to `out_dir`; returns the report.

    Raises:
        RuntimeError: shards failed; the message names them. Raised after all other shards are encoded.
    """
    curated, encoder = open_curated(curated_dir), PromptEncoder(components_dir, config)
    version = envs.CACHE_VERSIONS["texts"]
    settings = {"encoder": encoder.digest} | {name: getattr(config, name) for name in TEXT_KEYS}
    prefix = make_part(
        "texts",
        PREFIX,
        version,
        settings,
        lambda out: texts.write_prefix_part(encoder, out),
        config=settings,
    )

    def encode(part: Part) -> tuple[Part, dict[str, int]]:
        selection = curated.selection(part)
        train = selection.filter(pc.equal(selection["split"], "train"))
        key = settings | {"records": train.select(texts.COLUMNS).to_pylist()}
        made = make_part(
            "texts",
            part.name,
            version,
            key,
            lambda out: texts.encode_texts(train, part.name, encoder, out),
            config=settings,
        )
        return made, {"records": len(selection), HELD_OUT: len(selection) - len(train)}

    return _encode_group(curated, encode, group, groups, out_dir, [prefix])


def encode_latents_group(
    curated_dir: str | Path,
    components_dir: Path,
    stage: StageConfig,
    fractions: Mapping[str, float],
    config: EncodingConfig,
    group: int,
    groups: int,
    out_dir: Path,
) -> dict[str, Any]:
    """Like `encode_texts_group`, for the latents of one stage.

    Args:
        fractions: see `fractions_of`.
    """
    curated = open_curated(curated_dir)
    shape = latents.StageShape(image_size_px=stage.image_size_px, aspect_ratios=stage.aspect_ratios)
    settings = {"vae": latents.vae_digest(components_dir), "stage": shape.model_dump(mode="json")}
    settings |= {name: getattr(config, name) for name in LATENT_KEYS}
    channels, encoder = latents.latent_channels(components_dir), _lazy(lambda: latents.image_encoder(components_dir))

    def encode(part: Part) -> tuple[Part, dict[str, int]]:
        selection = curated.selection(part)
        rows, held_out, not_drawn = latents.draw(selection, fractions, stage.image_size_px, stage.bucket_weights)
        key = settings | {"records": latents.records_of(selection, rows)}

        def make(changed: dict[int, str]) -> Part:
            return make_part(
                "latents",
                part.name,
                envs.CACHE_VERSIONS["encoding"],
                key | ({"changed": sorted(changed)} if changed else {}),
                lambda out: latents.encode_latents(curated, part, rows, shape, config, channels, encoder, out, changed),
                config=settings,
            )

        try:
            made = make({})
        except ChangedRecords as error:
            made = make(error.reasons)  # under another key, so that a restored source is read again
        return made, {"records": len(selection), HELD_OUT: held_out, NOT_DRAWN: not_drawn}

    return _encode_group(curated, encode, group, groups, out_dir, [])


def fractions_of(curated_dir: str | Path, stage: StageConfig) -> dict[str, float]:
    """The fraction of each tier's images that a stage encodes (`fractions.drawn_fractions`).

    Reads the tiers of all selections only if the stage may draw less than an epoch. A stage that weights episodes encodes the
    whole of each tier that it draws: how often it draws an image depends on the image's episode as well.
    """
    curated = open_curated(curated_dir)
    records = curated.num_records
    weights = {weight for weight in stage.tier_weights.values() if weight}
    if stage.bucket_weights or stage.steps * stage.batch_size * min(weights, default=1.0) >= records * max(
        weights, default=1.0
    ):
        return {tier: float(weight > 0) for tier, weight in stage.tier_weights.items()}
    return drawn_fractions(stage, images_by_tier(curated_dir))


def _lazy(make: Callable[[], Callable]) -> Callable:
    """Delays `make` until the first call, so that a group whose parts all exist loads no model."""
    made: list[Callable] = []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(make())
        return made[0](*arguments)

    return call


def _encode_group(
    curated: Curated,
    encode: Callable[[Part], tuple[Part, dict[str, int]]],
    group: int,
    groups: int,
    out_dir: Path,
    parts: list[Part],
) -> dict[str, Any]:
    selections = list(curated.parts())
    selected = [selections[i] for i in group_range(group, groups, len(selections))]
    reports, failed = [], []
    with pq.ParquetWriter(out_dir / ENCODING_LEDGER, LEDGER, compression="zstd") as ledger:
        for number, selection in enumerate(selected, start=1):
            try:
                part, counted = encode(selection)
            except Exception as error:
                failed.append(f"{selection.name}: {type(error).__name__}: {error}")
                logger.warning(f"shard {failed[-1]}")
                continue
            parts.append(part)
            directory = fetch_part(part, TENSORS)
            ledger.write_table(pq.read_table(directory / LEDGER_TABLE))
            records = counted.pop("records")
            counts = {name: count for name, count in counted.items() if count}
            reports += [json.loads((directory / REPORT).read_text()), {"records": records, "counts": counts}]
            logger.info(f"{part.kind}: shard {number} of {len(selected)} of group {group}, {part.rows} records")
    if failed:
        named = "; ".join(failed[:10])
        raise RuntimeError(f"{len(failed)} of {len(selected)} shards of group {group} failed: {named}")
    write_index(out_dir, parts)
    report = add_up(reports)
    (out_dir / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return report


def gather(
    curated_dir: str | Path, groups: Sequence[Path | None], kind: str, out_dir: Path, **report: Any
) -> dict[str, Any]:
    """Writes the index of all groups' parts, the ledger, report.json and report.html to `out_dir`; returns the report.

    Args:
        groups: output directories of `encode_texts_group` or `encode_latents_group`; None for a failed group.
        report: further entries of the report.

    Raises:
        ValueError: no record was encoded.
    """
    selections = list(open_curated(curated_dir).parts())
    reports: list[dict[str, Any]] = []
    with pq.ParquetWriter(out_dir / ENCODING_LEDGER, LEDGER, compression="zstd") as ledger:

        def failed(group: int) -> Iterator[Part]:
            for i in group_range(group, len(groups), len(selections)):
                name, rows = selections[i].name, selections[i].rows
                reports.append(
                    {
                        "records": rows,
                        "encoded": 0,
                        "counts": {SHARD_FAILED: rows},
                        "examples": {SHARD_FAILED: f"shard {name} of group {group}"},
                    }
                )
                row = {"key": name, "record_id": "", "kept": False, "rule": SHARD_FAILED, "row": -1}
                detail = f"group {group} failed; its {rows} records are not encoded"
                ledger.write_table(pa.Table.from_pylist([row | {"detail": detail, "file": "", "shard": name}], LEDGER))
                yield Part(name, kind, error=detail)

        write_index(out_dir, _parts(groups, failed, reports, ledger))
    total = add_up(reports) | report
    if not total.get("encoded"):
        rules = ", ".join(
            f"{rule} {count} (such as {total['examples'].get(rule, '-')})"
            for rule, count in total.get("counts", {}).items()
        )
        raise ValueError(f"none of {total.get('records', 0)} curated records could be encoded as {kind}: {rules}")
    if images := total.get("encoded") if "latent_sum" in total else 0:
        mean = total.pop("latent_sum") / images
        total |= {"latent_mean": mean, "latent_std": (total.pop("latent_square_sum") / images - mean**2) ** 0.5}
        total["mean_crop"] = total.pop("crop_sum") / images
    (out_dir / REPORT).write_text(json.dumps(total, indent=1, sort_keys=True) + "\n")
    (out_dir / PAGE).write_text(page(total, out_dir / ENCODING_LEDGER, title(kind, report)))
    return total


def _parts(
    groups: Sequence[Path | None],
    failed: Callable[[int], Iterable[Part]],
    reports: list[dict[str, Any]],
    ledger: pq.ParquetWriter,
) -> Iterator[Part]:
    prefix_written = False
    for group, directory in enumerate(groups):
        if directory is None:
            yield from failed(group)
            continue
        reports.append(json.loads((directory / REPORT).read_text()))
        for batch in pq.ParquetFile(directory / ENCODING_LEDGER).iter_batches():
            ledger.write_batch(batch)
        for part in read_index(directory):
            if part.name != PREFIX or not prefix_written:  # all groups contain the same prefix part
                yield part
            prefix_written |= part.name == PREFIX
