"""Stores the last scores: one record for each source of models and benchmark, in the store.

    STORE/evaluations/KEY.json   {"model", "settings", "scorecard", "references", "gated"}

`scorecard` is the last one, `gated` whether `gate` has seen it. `references` has a scorecard of each kind, the newest last:
cards of one kind can be compared (`comparison_key`). So an unchanged model is scored once and alarms once, and a night that
ends before the gate is made up for by the next one. A reference is replaced only by a better score: neither a drop nor a slow
decline, each step of which is within noise, lowers it. A card of another kind than any reference (other judges, other prompts) is not compared, which
`gate` says, and becomes the reference of its kind; the others stay, so that going back to them is gated again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.config import EvalConfig
from eval.judging.protocols import digest_of
from eval.scorecards import card as cards
from eval.scorecards.card import Scorecard, comparison_key
from model import storage
from tasks import envs
from tasks.evaluation.evaluate import DropError, check_drop
from tasks.evaluation.models import Model
from tasks.store import store

YES, NO = "yes", "no"
KEPT = 16  # references of different kinds


def _place(source: str, benchmark: str) -> str:
    return storage.join(store(), "evaluations", f"{benchmark.replace(':', '-')}-{digest_of(source)[:16]}.json")


def _settings(config: EvalConfig) -> str:
    """Digest of everything except the model that determines a score. Judges from the Hub are pinned by NAME@COMMIT."""
    return digest_of(
        [envs.CACHE_VERSIONS["prompts"], envs.CACHE_VERSIONS["evaluation"], config.model_dump(mode="json")]
    )


def read(source: str, benchmark: str) -> dict[str, Any]:
    """The record; {} if nothing was scored yet.

    Raises:
        ValueError: it is damaged.
    """
    place = _place(source, benchmark)
    content = storage.read_bytes(place)
    if content is None:
        return {}
    try:
        record = json.loads(content)
        texts = {key: str(record[key]) for key in ("model", "settings", "scorecard", "gated")}
        return {**texts, "references": {str(key): str(place) for key, place in record["references"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is not a record of an evaluation: {error!r}; remove it to start again") from error


def _write(source: str, benchmark: str, record: dict[str, Any]) -> None:
    place = _place(source, benchmark)
    if not storage.is_remote(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(place, json.dumps(record, indent=1).encode())


def is_known(source: str, model: Model, config: EvalConfig) -> bool:
    """Whether the last score of `source` is of this model and these settings, and went through the gate."""
    record = read(source, config.benchmark)
    known = {"model": model.digest, "settings": _settings(config), "gated": YES}
    return bool(record) and known.items() <= record.items()


def store_score(source: str, model: Model, config: EvalConfig, scorecard: str, card: Scorecard) -> str:
    """Records a scorecard; returns JSON for `gate`.

    Args:
        scorecard: its path or URI.
        card: its content.
    """
    references = read(source, config.benchmark).get("references", {})
    record = {
        "model": model.digest,
        "settings": _settings(config),
        "scorecard": scorecard,
        "references": references,
        "gated": NO,
    }
    _write(source, config.benchmark, record)
    return json.dumps(
        {
            "source": source,
            "benchmark": config.benchmark,
            "scorecard": scorecard,
            "key": comparison_key(card),
            "references": references,
        }
    )


def gate(stored: Sequence[str], fetch: Callable[[str], Path], log: Callable[[str], None] = print) -> list[str]:
    """One sentence for each score that is not a drop. Better ones, and the first of their kind, become references.

    Args:
        stored: results of `store_score`.
        fetch: (path or URI of a scorecard) -> its directory on this machine.
        log: gets each sentence, also those about drops.

    Raises:
        DropError: scores dropped beyond noise; names each, and those that could not be read. The others are still
            accepted.
        ValueError: a scorecard or a reference cannot be read. Its score is gated again the next night.
    """
    sentences, drops = [], []
    failures: list[tuple[str, Exception]] = []

    def failed(item: Mapping[str, Any], error: Exception) -> None:
        failures.append((item["benchmark"], error))
        log(f"{item['benchmark']} cannot be gated: {error}")

    for text in stored:
        item = json.loads(text)
        scorecard, key, references = item["scorecard"], item["key"], item["references"]
        update: dict[str, Any] = {"gated": YES}
        try:
            if key in references:
                verdict, sentence = check_drop(fetch(references[key]), fetch(scorecard))
            else:
                verdict = "first of its kind"
                sentence = _not_compared(fetch(scorecard), fetch(list(references.values())[-1]) if references else None)
        except DropError as error:
            drops.append(str(error))
            log(str(error))
        except Exception as error:  # stores raise their own types; what was seen before must still be reported
            failed(item, error)
            continue
        else:
            log(sentence)
            sentences.append(sentence)
            if verdict in ("better", "first of its kind"):
                others = [(other, place) for other, place in references.items() if other != key]
                update["references"] = dict([*others, (key, scorecard)][-KEPT:])
        try:
            record = read(item["source"], item["benchmark"])
            if record.get("scorecard") == scorecard:
                _write(item["source"], item["benchmark"], record | update)
        except Exception as error:
            failed(item, error)
    texts = [f"{benchmark} cannot be gated: {error}" for benchmark, error in failures]
    if drops:
        raise DropError("; ".join([*drops, *texts]))
    if failures:
        raise ValueError("; ".join(texts)) from failures[-1][1]
    return sentences


def _not_compared(scorecard: Path, latest: Path | None) -> str:
    """Says that a score has no reference, and why.

    Args:
        latest: the newest reference, of another kind; None if there is none.
    """
    card = cards.load(scorecard)
    shown = f"{card.name} {card.scale * card.overall.mean:.3f}"
    if latest is None:
        return f"{shown}: the first score, nothing to compare it with"
    other = cards.load(latest)
    return (
        f"{shown}: NOT COMPARED with the reference ({other.name} {other.scale * other.overall.mean:.3f}): "
        f"{cards.not_comparable(other, card)}. It is the reference of later scores by its prompts and judges; compare the "
        "models by hand if the weights changed too"
    )
