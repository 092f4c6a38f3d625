"""Stores the last scores: one record for each source of models and benchmark, in the store.

    STORE/evaluations/KEY.json   {"model", "settings", "scorecard", "accepted", "gated"}

`scorecard` is the last one, `gated` whether `gate` has seen it, `accepted` the last that was not a drop. So an unchanged
model is scored once and alarms once, a night that ends before the gate is made up for by the next one, and a model that
dropped does not become the reference of the next one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from eval.config import EvalConfig
from eval.judging.protocols import digest_of
from model import storage
from tasks import envs
from tasks.evaluation.evaluate import DropError, check_drop
from tasks.evaluation.models import Model
from tasks.store import store

KEYS, YES, NO = ("model", "settings", "scorecard", "accepted", "gated"), "yes", "no"


def _place(source: str, benchmark: str) -> str:
    return storage.join(store(), "evaluations", f"{benchmark.replace(':', '-')}-{digest_of(source)[:16]}.json")


def _settings(config: EvalConfig) -> str:
    """Digest of everything except the model that determines a score. Judges from the Hub are pinned by NAME@COMMIT."""
    return digest_of(
        [envs.CACHE_VERSIONS["prompts"], envs.CACHE_VERSIONS["evaluation"], config.model_dump(mode="json")]
    )


def read(source: str, benchmark: str) -> dict[str, str]:
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
        return {key: str(record[key]) for key in KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a record of an evaluation: {error!r}; remove it to start again") from error


def _write(source: str, benchmark: str, record: dict[str, str]) -> None:
    place = _place(source, benchmark)
    if not storage.is_remote(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(place, json.dumps(record, indent=1).encode())


def is_known(source: str, model: Model, config: EvalConfig) -> bool:
    """Whether the last score of `source` is of this model and these settings, and went through the gate."""
    record = read(source, config.benchmark)
    known = {"model": model.digest, "settings": _settings(config), "gated": YES}
    return bool(record) and known.items() <= record.items()


def store_score(source: str, model: Model, config: EvalConfig, scorecard: str) -> str:
    """Records a scorecard; returns JSON for `gate`.

    Args:
        scorecard: its path or URI.
    """
    before = read(source, config.benchmark)
    accepted = before.get("accepted", "")
    record = {
        "model": model.digest,
        "settings": _settings(config),
        "scorecard": scorecard,
        "accepted": accepted,
        "gated": NO,
    }
    _write(source, config.benchmark, record)
    return json.dumps({"source": source, "benchmark": config.benchmark, "scorecard": scorecard, "incumbent": accepted})


def gate(stored: Sequence[str], fetch: Callable[[str], Path]) -> list[str]:
    """One sentence for each score that is not a drop; these become the accepted scores.

    Args:
        stored: results of `store_score`.
        fetch: (path or URI of a scorecard) -> its directory on this machine.

    Raises:
        DropError: scores dropped beyond noise; names each. The others are still accepted.
    """
    sentences, drops = [], []
    for text in stored:
        item = json.loads(text)
        try:
            if item["incumbent"]:
                sentence = check_drop(fetch(item["incumbent"]), fetch(item["scorecard"]))
            else:
                sentence = f"{item['benchmark']}: the first score, nothing to compare it with"
        except DropError as error:
            drops.append(str(error))
            update = {"gated": YES}
        else:
            sentences.append(sentence)
            update = {"gated": YES, "accepted": item["scorecard"]}
        record = read(item["source"], item["benchmark"])
        if record.get("scorecard") == item["scorecard"]:
            _write(item["source"], item["benchmark"], record | update)
    if drops:
        raise DropError("; ".join(drops))
    return sentences
