"""Error bars say how much a score would move, over seeds and over prompts."""

import numpy as np
import pytest

from eval.stats import bootstrap, over_seeds


def test_mean_and_deviation_over_seeds_state_the_runs():
    result = over_seeds({2: 0.5, 0: 0.7, 1: 0.6})
    assert result["mean"] == pytest.approx(0.6) and result["std"] == pytest.approx(0.1)
    assert result["runs"] == 3 and result["seeds"] == [0, 1, 2] and result["values"] == [0.7, 0.6, 0.5]


def test_one_run_has_no_deviation():
    assert over_seeds({7: 0.5})["std"] is None
    with pytest.raises(ValueError, match="no run"):
        over_seeds({})


def test_the_interval_of_many_prompts_is_the_normal_one():
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.8).astype(int)
    low, high = bootstrap({"colors": [(r, 1) for r in right]}, samples=4000)["tasks"]["colors"]
    error = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(right.mean() - error, abs=0.005)
    assert high == pytest.approx(right.mean() + error, abs=0.005)


def test_prompts_are_drawn_with_all_of_their_images():
    """Images of one prompt are no independent evidence: 100 of each of two prompts give the interval of two."""
    assert bootstrap({"colors": [(100, 100), (0, 100)]})["tasks"]["colors"] == [0.0, 1.0]


def test_the_overall_interval_is_stratified_by_task():
    """Tasks without spread give an overall score without spread, however they differ."""
    result = bootstrap({"easy": [(1, 1)] * 5, "hard": [(0, 1)] * 50})
    assert result["overall"] == [0.5, 0.5]


def test_the_same_seed_gives_the_same_interval():
    tasks = {"a": [(i % 2, 1) for i in range(30)], "b": [(i % 3, 3) for i in range(30)]}
    assert bootstrap(tasks, seed=1) == bootstrap(tasks, seed=1) != bootstrap(tasks, seed=2)


@pytest.mark.parametrize(
    ("tasks", "options"),
    [({}, {}), ({"a": []}, {}), ({"a": [(1, 1)]}, {"samples": 0}), ({"a": [(1, 1)]}, {"level": 1.0})],
)
def test_impossible_requests_are_refused(tasks, options):
    with pytest.raises(ValueError):
        bootstrap(tasks, **options)
