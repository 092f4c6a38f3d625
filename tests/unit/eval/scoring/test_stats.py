"""Intervals have their coverage, tests keep their level, and a choice among equals keeps the incumbent."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest

from eval.stats import choose, compare, estimate, interval, mean_interval, over_seeds, pool

_SPEC = importlib.util.spec_from_file_location(
    "interval_coverage", Path(__file__).resolve().parents[4] / "benchmarks/evaluation/interval_coverage.py"
)
simulation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(simulation)


def test_mean_and_deviation_over_seeds_state_the_runs():
    result = over_seeds({2: 0.5, 0: 0.7, 1: 0.6})
    assert result["mean"] == pytest.approx(0.6) and result["std"] == pytest.approx(0.1)
    assert result["runs"] == 3 and result["seeds"] == [0, 1, 2] and result["values"] == [0.7, 0.6, 0.5]


def test_one_run_has_no_deviation():
    assert over_seeds({7: 0.5})["std"] is None and mean_interval([0.5]) is None
    with pytest.raises(ValueError, match="no run"):
        over_seeds({})


def test_two_runs_have_students_interval():
    low, high = mean_interval([0.4, 0.6])
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(2 * 12.706 * 0.1, rel=1e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.4])
@pytest.mark.parametrize(
    "layout", [(0.99, 80, 4), (0.95, 4, 36), (0.99, 22, 6), (0.87, 100, 4)], ids=lambda v: "-".join(map(str, v))
)
@pytest.mark.parametrize("continuous", [False, True], ids=["right-or-wrong", "continuous"])
def test_intervals_cover_their_nominal_share_and_have_a_width(layout, correlation, continuous):
    covered, without_width, _ = simulation.coverage(*layout, correlation, continuous=continuous, runs=400)
    assert covered >= 0.92 and without_width == 0


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_the_mean_of_geneval_s_categories_is_covered(correlation):
    assert simulation.mix_coverage(correlation, runs=150) >= 0.92


@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.4])
def test_two_equal_models_are_rarely_called_different(correlation):
    shares = simulation.verdicts(simulation.GENEVAL, simulation.ACCURACY, 4, correlation, runs=200, flips=499)
    assert shares["better"] + shares["worse"] <= 0.06
    few = simulation.verdicts({"a": 22}, {"a": 0.95}, 6, correlation, runs=100, flips=499)
    assert few["better"] + few["worse"] <= 0.06


def test_a_real_gain_is_seen():
    shares = simulation.verdicts(simulation.GENEVAL, simulation.ACCURACY, 4, 0.2, gain=0.04, runs=50, flips=499)
    assert shares["better"] >= 0.8 and shares["worse"] == 0


@pytest.mark.parametrize("correlation", [0.0, 0.2])
@pytest.mark.slow
def test_of_sixteen_equal_candidates_a_wrong_one_is_rarely_chosen(correlation):
    _, wrong = simulation.choices(16, correlation, runs=120, flips=299)
    assert wrong <= 0.05


def test_one_bad_candidate_hides_no_good_one():
    rng = np.random.default_rng(0)
    q = {"a": rng.beta(8, 2, size=300)}
    draw = lambda shift: {"a": rng.binomial(4, np.clip(q["a"] + shift, 0, 1)) / 4}  # noqa: E731
    choice = choose(draw(0), [draw(-0.6), draw(0.1), draw(0)], flips=999)
    assert choice.index == 1 and choice.low[1] > 0 and choice.p[0] > 0.5


def test_a_candidate_that_is_clearly_better_is_chosen():
    right, wrong = simulation.choices(16, 0.2, gain=0.08, runs=20, flips=499)
    assert right >= 0.9 and wrong <= 0.05


def test_a_naive_choice_of_the_best_would_be_wrong_nearly_always():
    """Without a preference for the incumbent, one of sixteen equals nearly always looks better."""
    rng = np.random.default_rng(0)
    scores = rng.binomial(4, 0.9, size=(50, 17, 300)).mean(axis=-1)
    assert (scores[:, 1:].max(axis=1) > scores[:, 0]).mean() > 0.8


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_category_that_is_all_right_or_all_wrong_has_an_interval(value):
    few, many = interval([[value] * 4] * 4), interval([[value] * 4] * 80)
    for e in (few, many):
        assert e.low < e.high and value in (e.low, e.high) and e.total > 0
    assert many.high - many.low < few.high - few.low


def test_images_of_one_prompt_are_not_counted_as_independent():
    """100 right images of one prompt and 100 wrong of another are two observations."""
    alike = interval([[1.0] * 100, [0.0] * 100])
    mixed = interval([[1.0, 0.0] * 50] * 10)
    assert alike.low < 0.05 and alike.high > 0.95
    assert mixed.high - mixed.low < 0.2


def test_sampling_and_prompt_noise_add_up_and_tell_themselves_apart():
    rng = np.random.default_rng(0)
    prompts_differ = interval([[float(i % 2)] * 8 for i in range(60)])
    images_differ = interval(rng.permuted(np.tile([0.0, 1.0], (60, 4)), axis=1))
    assert prompts_differ.sampling == 0 and prompts_differ.prompts == pytest.approx(prompts_differ.total)
    assert images_differ.prompts < images_differ.sampling
    for e in (prompts_differ, images_differ):
        assert e.sampling**2 + e.prompts**2 == pytest.approx(e.total**2)
    single = interval([[1.0], [0.0]])
    assert single.sampling is None and single.prompts is None  # one image per prompt gives no estimate


def test_sampling_noise_is_the_deviation_of_reruns_on_the_same_prompts():
    rng = np.random.default_rng(1)
    q = rng.beta(4, 1, size=100)
    reruns = [rng.binomial(4, q).mean() / 4 for _ in range(2000)]
    claimed = np.mean([interval((rng.random((100, 4)) < q[:, None]).astype(float)).sampling for _ in range(50)])
    assert claimed == pytest.approx(np.std(reruns), rel=0.05)


def test_a_prompt_counts_once_where_prompts_are_pooled():
    groups = {"a": [[1.0] * 9, [0.0]], "b": [[1.0]]}
    overall, by_category = estimate(groups, "prompts")
    assert overall.mean == pytest.approx(2 / 3) and by_category["a"].mean == pytest.approx(0.5)
    by_image, by_category = estimate(groups, "categories")
    assert by_image.mean == pytest.approx((0.9 + 1) / 2) and by_category["a"].mean == pytest.approx(0.9)


def test_the_order_of_prompts_and_images_does_not_matter():
    rng = np.random.default_rng(0)
    scores = rng.random((30, 4))
    shuffled = rng.permutation(rng.permuted(scores, axis=1))
    a, b = interval(scores), interval(shuffled)
    assert (a.mean, a.low, a.high, a.total) == pytest.approx((b.mean, b.low, b.high, b.total))


def test_a_comparison_is_antisymmetric_and_its_interval_agrees_with_its_test():
    rng = np.random.default_rng(3)
    pairs = {"a": rng.random((40, 2)), "b": rng.random((60, 2)) * [0.8, 1.0]}
    d, e = compare(pairs), compare({name: values[:, ::-1] for name, values in pairs.items()})
    assert d.mean == pytest.approx(-e.mean) and d.p == e.p and d.low == pytest.approx(-e.high, abs=1e-6)
    assert (d.low > 0 or d.high < 0) == (d.verdict in ("better", "worse"))


def test_equal_scores_are_equal_only_within_a_margin_that_they_can_show():
    same = {"a": [(1.0, 1.0)] * 400}
    assert compare(same).verdict == "cannot tell"
    assert compare(same, margin=0.01).verdict == "equal"
    few = compare({"a": [(1.0, 1.0)] * 4}, margin=0.01)
    assert few.verdict == "cannot tell" and few.visible > 0.1 and few.low < few.high
    assert "smallest visible difference" in few.sentence()


def test_five_prompts_cannot_show_any_difference_and_six_can():
    """2^-5 of the sign flips agree in all five signs: two-sided 0.0625."""
    assert compare({"a": [(0.0, 1.0)] * 5}).verdict == "cannot tell"
    assert compare({"a": [(0.0, 1.0)] * 12}).verdict == "better"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "0 prompts"),
        (lambda: interval([[1.0], []]), "1 of them without images"),
        (lambda: interval([[1.5]]), r"in \[0, 1\]"),
        (lambda: interval([[float("nan")]]), r"in \[0, 1\]"),
        (lambda: interval([[1.0]], level=1.0), "level=1.0"),
        (lambda: pool([]), "no categories"),
        (lambda: compare({"a": []}), "without one"),
        (lambda: choose({"a": [1.0]}, []), "no candidate"),
        (lambda: choose({"a": [1.0]}, [{"a": [1.0, 0.0]}]), "other prompts"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_benchmark_of_55000_answers_takes_well_under_a_second():
    groups = {"all": np.random.default_rng(0).random((1065, 52))}
    begin = time.process_time()
    estimate(groups, "prompts")
    assert time.process_time() - begin < 0.5
