"""The gate and its comparison on random scores: a drop beyond noise is never passed, and an equal score never fails."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import stats
from eval.config import EvalConfig
from eval.scorecards import card as cards
from eval.scorecards import compare
from tasks.evaluation import history
from tasks.evaluation.evaluate import DropError
from tasks.evaluation.models import Model

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
randoms = st.integers(0, 2**64 - 1).map(random.Random)  # cases are drawn by Python's generator, which is faster


def pairs_of(rng) -> dict[str, list[tuple[float, float]]]:
    """(score before, score now) of at most 9 prompts, so that all combinations of signs can be listed."""
    drop, values = rng.choice([0.0, 0.0, 0.3, 0.6, 1.0]), rng.choice([[0.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]])
    pairs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rng.randrange(1, 10)):
        before = rng.choice(values)
        now = 0.0 if rng.random() < drop else rng.choice([before, before, rng.choice(values)])
        pairs.setdefault(rng.choice("ab"), []).append((before, now))
    return pairs


def by_all_signs(pairs: dict[str, list[tuple[float, float]]], pooling: str) -> tuple[float, float, float]:
    """(mean difference, share of all combinations of signs with a difference as large, the least width of an interval)."""
    count = sum(map(len, pairs.values()))
    weighted, weights = [], []
    for values in pairs.values():
        weight = 1 / count if pooling == "prompts" else 1 / len(pairs) / len(values)
        weighted += [weight * (now - before) for before, now in values]
        weights += [weight] * len(values)
    mean = sum(weighted)
    sums = np.abs(np.array(list(itertools.product((-1, 1), repeat=count))) @ weighted)
    p = float((sums >= abs(mean) - 1e-6).mean())
    floor = stats.student(0.95, max(count - 1, 1)) * math.sqrt(sum(w * w for w in weights) * max(weights))
    return mean, p, floor


@SETTINGS
@given(randoms)
def test_a_verdict_needs_a_difference_that_few_combinations_of_signs_reach_and_then_cannot_be_missed(rng):
    pairs, pooling = pairs_of(rng), rng.choice(["categories", "prompts"])
    mean, p, floor = by_all_signs(pairs, pooling)
    result = stats.compare(pairs, pooling)
    assert result.mean == pytest.approx(mean, abs=1e-9) and result.p == pytest.approx(p, abs=1e-9)
    assert result.low <= mean + 1e-9 and mean - 1e-9 <= result.high
    if result.verdict in ("better", "worse"):
        assert p <= 0.05 and (result.verdict == "worse") == (mean < 0) and abs(mean) > floor - 1e-9
    # Beyond noise: the test rejects shifts of 0 and of all in the other direction, and the two pseudo-prompts do too.
    shifted = [{k: [(a, b - step) for a, b in v] for k, v in pairs.items()} for step in (0.0, *_steps(mean))]
    if abs(mean) > floor + 1e-9 and all(by_all_signs(one, pooling)[1] <= 0.05 for one in shifted):
        assert result.verdict == ("worse" if mean < 0 else "better")


def _steps(mean: float) -> list[float]:
    """Shifts on the other side of 0 than the mean."""
    return [-math.copysign(step, mean) for step in (0.01, 0.1, 0.5)]


@SETTINGS
@given(randoms)
def test_exchanged_models_have_the_opposite_verdict_and_neither_order_nor_names_matter(rng):
    pairs, pooling = pairs_of(rng), rng.choice(["categories", "prompts"])
    there = stats.compare(pairs, pooling)
    back = stats.compare({name: [(b, a) for a, b in values] for name, values in pairs.items()}, pooling)
    opposite = {"better": "worse", "worse": "better"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert (back.mean, back.low, back.high, back.p) == pytest.approx((-there.mean, -there.high, -there.low, there.p), abs=1e-6)  # fmt: skip
    mixed = {
        f"other {name}": rng.sample(pairs[name], len(pairs[name])) for name in rng.sample(sorted(pairs), len(pairs))
    }
    again = stats.compare(mixed, pooling)
    assert again.verdict == there.verdict and again.p == pytest.approx(there.p, abs=1e-9)


# ---- nights


PROMPTS = 12
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def scorecards(tmp_path_factory) -> dict[str, Path]:
    """Scorecards of 12 prompts: equal scores of all, mixed ones, and two by another judge."""
    from test_scorecard_properties import Graded

    from eval.benchmarks.base import Judged
    from eval.judging.run import score_rows, write_rows
    from eval.scorecards.make_card import scorecard

    config = EvalConfig(benchmark="test_scorecard_properties:Graded", seeds=(0,), images_per_prompt=1)
    prompts = [{"id": f"p{i}", "prompt": f"prompt {i}", "tag": "a", "split": "seen"} for i in range(PROMPTS)]
    grades = {f"all {level}": [level] * PROMPTS for level in LEVELS}
    rng = random.Random(0)
    grades |= {f"mixed {i}": [rng.choice(LEVELS) for _ in range(PROMPTS)] for i in range(3)}
    made = {}
    for (name, values), judge in itertools.product(grades.items(), ("grader", "other")):
        if judge == "other" and name not in ("all 0.0", "all 1.0"):
            continue
        folder = tmp_path_factory.mktemp("card")
        answered = {0: {f"p{i}": Judged([{"grade": value}]) for i, value in enumerate(values)}}
        rows = [
            {"seed": 0, "prompt_index": i, "prompt_id": f"p{i}", "image_index": 0, "prompt": "", "error": "", "category": "a",
             "split": "seen", "sha256": name, "file": f"{i}"}
            for i in range(PROMPTS)
        ]  # fmt: skip
        scored = score_rows(rows, prompts, Graded(), answered)
        record = {"grade": {"name": judge, "model": "m", "revision": judge[0] * 64, "spec": {}}}
        card = scorecard(scored, prompts, config, {"provenance": {"model": name}}, record, answered)
        write_rows(scored, folder / compare.SCORES)
        (folder / cards.FILE).write_text(cards.dumps(card))
        made[f"{name} by {judge}"] = folder
    return made


@pytest.fixture(scope="module")
def verdicts(scorecards):
    """(reference, tonight) -> verdict."""
    names = list(scorecards)
    return {
        (a, b): compare.compare_to_incumbent(scorecards[a], scorecards[b])[0]
        for a, b in itertools.product(names, names)
    }


CONFIG = EvalConfig(benchmark="shapes")


def night(records: dict, name: str, digest: str, folder: Path, monkeypatch) -> str:
    """ "passed" or "failed"; `records` stands for the store."""
    monkeypatch.setattr(history, "read", lambda source, benchmark: records.get((source, benchmark), {}))
    monkeypatch.setattr(
        history, "_write", lambda source, benchmark, record: records.update({(source, benchmark): record})
    )
    card = cards.load(folder)
    stored = history.store_score("source", Model(place="/somewhere", digest=digest), CONFIG, name, card)
    try:
        history.gate([stored], lambda place: FOLDERS[place], log=lambda _: None)
    except DropError:
        return "failed"
    return "passed"


FOLDERS: dict[str, Path] = {}


def test_an_equal_score_never_fails_and_a_drop_of_every_prompt_never_passes(scorecards, verdicts):
    for name in scorecards:
        assert verdicts[name, name] == "cannot tell"
    for high, low in itertools.combinations(reversed(LEVELS), 2):
        assert verdicts[f"all {high} by grader", f"all {low} by grader"] == "worse"
        assert verdicts[f"all {low} by grader", f"all {high} by grader"] == "better"
    assert verdicts["all 1.0 by grader", "all 0.0 by other"] is None


@settings(SETTINGS, max_examples=20)
@given(randoms)
def test_over_any_nights_the_gate_fails_exactly_on_drops_and_a_reference_never_gets_worse(scorecards, verdicts, rng):
    FOLDERS.update(scorecards)
    records: dict = {}
    references: dict[str, str] = {}  # judge -> name of the card
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in range(rng.randrange(1, 9)):
            name = rng.choice(sorted(scorecards))
            judge = name.rpartition(" ")[2]
            verdict = verdicts[references[judge], name] if judge in references else "first"
            digest = f"{number:064x}"
            assert night(records, name, digest, scorecards[name], monkeypatch) == (
                "failed" if verdict == "worse" else "passed"
            )
            if verdict in ("better", "first"):
                references[judge] = name
            (record,) = records.values()
            assert set(record["references"].values()) == set(references.values()) and record["gated"] == "yes"
            assert history.is_known("source", Model(place="/elsewhere", digest=digest), CONFIG)


def test_a_night_of_another_judge_hides_no_drop_of_the_first(scorecards, monkeypatch):
    FOLDERS.update(scorecards)
    records: dict = {}
    names = ["all 1.0 by grader", "all 0.0 by other", "all 0.0 by grader"]
    results = [night(records, name, f"{i:064x}", scorecards[name], monkeypatch) for i, name in enumerate(names)]
    assert results == ["passed", "passed", "failed"]
    assert records["source", "shapes"]["references"].keys() == {
        cards.comparison_key(cards.load(scorecards[name])) for name in names[:2]
    }
