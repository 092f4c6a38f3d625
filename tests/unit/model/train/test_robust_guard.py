"""Which steps are skipped, and when skipped steps end a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from model.config import SkipConfig
from model.train.guard import LossGuard

NAN, INF = math.nan, math.inf


def guard(losses=(), **config) -> LossGuard:
    made = LossGuard(SkipConfig(**{"window_steps": 20, "max_skipped": 4, **config}))
    assert [made.judge(loss, 1.0) for loss in losses] == [None] * len(losses)
    return made


@pytest.mark.parametrize("loss, norm", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_what_is_not_finite_is_skipped_and_counted_without_any_configuration(loss, norm):
    made = guard()
    assert "not finite" in made.judge(loss, norm)
    assert made.judge(1.0, 1.0) is None
    assert made.skipped == made.recently_skipped == 1


def test_by_default_no_finite_loss_is_skipped():
    made = guard([1.0] * 20)
    assert made.judge(1e30, 1e30) is None


def test_a_spike_is_the_configured_number_of_median_deviations_above_the_median():
    losses = np.random.default_rng(0).normal(1.0, 0.1, 20)
    median = np.median(losses)
    limit = median + 5 * np.median(np.abs(losses - median))
    assert guard(losses, spike_mads=5).judge(limit - 1e-9, 1.0) is None
    assert "is above" in guard(losses, spike_mads=5).judge(limit + 1e-9, 1.0)
    assert guard(losses, spike_mads=5).judge(-100.0, 1.0) is None  # a low loss is not a spike


def test_one_outlier_in_the_window_does_not_hide_the_next():
    losses = [1.0, 1.1, 0.9] * 4
    made = guard(losses, spike_mads=10)
    assert [made.judge(1000.0, 1.0) is None for _ in range(3)] == [False] * 3
    assert made.judge(1.05, 1.0) is None


def test_no_spike_is_seen_before_half_of_the_window_is_known():
    assert guard([1.0, 1.1] * 4, spike_mads=5).judge(100.0, 1.0) is None
    assert guard([1.0, 1.1] * 5, spike_mads=5).judge(100.0, 1.0) is not None


def test_too_many_skipped_steps_end_the_run_even_with_good_steps_between_them():
    made = guard()
    for i in range(4):
        assert not made.exhausted
        made.judge(NAN, 1.0)
        made.judge(1.0, 1.0)
    assert made.exhausted


def test_skipped_steps_outside_the_window_do_not_end_a_run():
    made = guard()
    for _ in range(10):
        made.judge(NAN, 1.0)
        for _ in range(9):
            made.judge(1.0, 1.0)
        assert not made.exhausted
    assert made.skipped == 10


@pytest.mark.parametrize("seen", [0, 7, 50])
def test_a_guard_that_is_loaded_judges_as_the_one_that_was_saved(seen):
    rng = np.random.default_rng(1)
    saved, loaded = guard(spike_mads=3), guard(spike_mads=3)
    losses = [NAN if rng.random() < 0.1 else loss for loss in rng.normal(1.0, 0.3, seen + 50)]
    for loss in losses[:seen]:
        saved.judge(loss, 1.0)
    state = saved.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in loaded.state_dict().items()
    }  # DCP loads into existing tensors
    loaded.load_state_dict(state)
    assert [saved.judge(loss, 1.0) for loss in losses[seen:]] == [loaded.judge(loss, 1.0) for loss in losses[seen:]]
    assert saved.skipped == loaded.skipped and saved.exhausted == loaded.exhausted


def test_a_limit_that_no_window_can_reach_is_refused():
    with pytest.raises(ValidationError, match="max_skipped=200 must be at most window_steps=100"):
        SkipConfig(max_skipped=200)
