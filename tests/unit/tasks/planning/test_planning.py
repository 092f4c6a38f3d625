"""Each task gets what it depends on and no more."""

from __future__ import annotations

import shutil

import pytest
from diskcache import Cache
from flyteidl.core import literals_pb2

from tasks import store
from tasks.manifest import seal, writing
from tasks.planning import local_cache
from tasks.planning.sections import check_ranks, check_workflow, encode_stage, for_own_images, scoring, train_stage
from tasks.recipe import load_recipe


def test_another_stages_steps_do_not_touch_this_stage():
    before = load_recipe("tiny")
    after = load_recipe("tiny", ["train.stages[2].steps=7"])
    assert train_stage(before, 0) == train_stage(after, 0)
    assert train_stage(before, 1) == train_stage(after, 1)
    assert train_stage(before, 2) != train_stage(after, 2)


def test_training_numbers_do_not_touch_encoding():
    before = load_recipe("tiny")
    after = load_recipe("tiny", ["train.stages[1].steps=7", "train.stages[1].batch_size=64", "train.optim.muon_lr=0.1"])
    assert encode_stage(before, 1) == encode_stage(after, 1)
    assert encode_stage(before, 1) != encode_stage(load_recipe("tiny", ["train.stages[1].image_size_px=64"]), 1)


def test_a_threshold_does_not_touch_scoring_but_a_scorer_does():
    before = load_recipe("tiny")
    assert scoring(before) == scoring(load_recipe("tiny", ["curation.filters.min_side_px=32"]))
    assert scoring(before) != scoring(load_recipe("tiny", ["curation.scorers.watermark=none"]))
    assert scoring(before) != scoring(load_recipe("tiny", ["curation.dedup.hash_size=16"]))


def test_own_images_keep_long_captions_and_need_no_psnr_and_change_nothing_else():
    recipe = load_recipe("tiny")
    own = for_own_images(recipe)
    assert own.curation.captions.max_words == 60 and own.components.min_psnr_db == 0.0
    assert own.curation.captions.max_words + 2 <= recipe.encoding.max_text_tokens
    restored = own.model_copy(update={"curation": recipe.curation, "components": recipe.components})
    assert restored == recipe
    assert own.curation.filters == recipe.curation.filters and own.components.vae == recipe.components.vae


def test_each_stage_trains_at_its_own_capacity_and_seed():
    recipe = load_recipe("tiny")
    sections = [train_stage(recipe, i) for i in range(3)]
    assert [s.model.capacity_factors for s in sections] == [s.capacity_factors for s in recipe.train.stages]
    assert len({s.train.seed for s in sections}) == 3


def test_only_the_stage_that_is_merged_hands_on_more_than_its_last_checkpoint():
    recipe = load_recipe("nucleus_17b")
    assert [train_stage(recipe, i).train.keep_checkpoints for i in range(3)] == [1, 1, recipe.merge.last_n]


@pytest.mark.parametrize(("recipe", "handed_on"), [
    ("nucleus_17b", [True, True, False]), ("smoke", [True, True, False]), ("tiny", [False] * 3),
])  # fmt: skip
def test_a_stage_hands_its_optimiser_state_on_where_another_goes_on_with_it(recipe, handed_on):
    assert [train_stage(load_recipe(recipe), i).hand_on_optimizer for i in range(3)] == handed_on


@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_number_of_stages_is_refused_and_not_cut_to_three(count):
    recipe = load_recipe("tiny")
    check_workflow(recipe)
    last = recipe.train.stages[-1]
    stages = (*recipe.train.stages, last.model_copy(update={"name": "fourth"}))[:count]
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"stages": stages})})
    with pytest.raises(ValueError, match=f"train.stages has {count} entries; the workflow trains 3"):
        check_workflow(other)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # Images would be scored with another text state than the one that was trained.
        (["encoding.hidden_state_index=-6"], "encoding.hidden_state_index=-6 must be -8"),
        (["eval.benchmark=geneval"], "eval.benchmark='geneval' has no detector"),
    ],
)
def test_what_would_fail_or_mislead_after_training_is_refused_before_it(overrides, told):
    with pytest.raises(ValueError, match=told):
        check_workflow(load_recipe("tiny", overrides))


def test_experts_spread_over_ranks_are_not_refused():
    check_workflow(load_recipe("tiny", ["train.nproc_per_node=2", "train.expert_parallel=2"]))


@pytest.mark.parametrize("ends_in", ["pipeline", "scorecard"])
def test_a_benchmark_without_a_detector_is_refused_where_it_would_be_scored_and_told_what_runs(ends_in):
    recipe = load_recipe("nucleus_17b")
    with pytest.raises(ValueError, match="eval.benchmark='geneval' has no detector.*workflows/pretrain.py pretrain"):
        check_workflow(recipe, ends_in)
    check_workflow(recipe, "merged")


def test_an_ablation_may_end_in_merged_weights_but_not_with_another_text_state():
    check_workflow(load_recipe("ablations/token_choice"), "merged")
    with pytest.raises(ValueError, match="hidden_state_index=-6 must be -8"):  # grids are sampled in training too
        check_workflow(load_recipe("nucleus_17b", ["encoding.hidden_state_index=-6"]), "merged")


@pytest.mark.parametrize(
    ("recipe", "registered", "local", "told"),
    [
        ("nucleus_17b", (1, 1), True, "8 x train.nproc_per_node=8 = 64, .* has 1 x 1 = 1 processes: set "
         "NUCLEUS_TRAIN_NNODES=8 NUCLEUS_TRAIN_NPROC=8 for pyflyte register or pyflyte run --remote"),
        ("nucleus_17b", (4, 8), False, "= 64, .* has 4 x 8 = 32 processes: .* for pyflyte register"),
        ("tiny", (8, 8), False, "nnodes=1 x train.nproc_per_node=1 = 1, .* has 8 x 8 = 64 processes"),
        ("tiny", (1, 2), True, "NUCLEUS_TRAIN_NPROC=1 for pyflyte run, or change the recipe"),
        ("nucleus_17b", (8, 8), True, "NUCLEUS_TRAIN_NNODES=8: a local run trains on this machine alone"),
    ],
)  # fmt: skip
def test_a_training_of_other_ranks_than_its_task_has_is_refused_with_the_arithmetic(recipe, registered, local, told):
    with pytest.raises(ValueError, match=told):
        check_ranks(load_recipe(recipe).train, *registered, local)


def test_ranks_that_fit_their_task_are_not_refused():
    for local in (True, False):
        check_ranks(load_recipe("tiny").train, 1, 1, local)
    check_ranks(load_recipe("nucleus_17b").train, 8, 8, False)
    check_ranks(load_recipe("nucleus_17b").train, 16, 4, False)  # as many, on smaller machines


def _artifact(home):
    with writing(home / "artifacts" / "records", by_digest=True) as out:
        (out / "data.txt").write_text("data")
        digest = seal(out, "records").digest
    return home / "artifacts" / "records" / digest


def _entry(path) -> bytes:
    literals = literals_pb2.LiteralMap()
    literals.literals["o0"].scalar.blob.uri = str(path)
    return literals.SerializeToString()


def test_cached_artifacts_that_are_gone_are_forgotten_and_others_kept(tmp_path):
    whole = _artifact(tmp_path / "one")
    broken = _artifact(tmp_path / "two")
    (broken / "data.txt").unlink()
    with Cache(str(tmp_path / "cache")) as cache:
        cache["whole"] = _entry(whole)
        cache["broken"] = _entry(broken)
        cache["gone"] = _entry(tmp_path / "three" / "artifacts" / "records" / "0123")
        cache["someone else's"] = _entry(tmp_path / "not" / "there")
    assert local_cache.forget_lost_artifacts(str(tmp_path / "cache")) == 2
    with Cache(str(tmp_path / "cache")) as cache:
        assert set(cache.iterkeys()) == {"whole", "someone else's"}


def test_an_index_of_which_a_part_is_gone_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    part = store.make_part("scores", "a", "1", {}, lambda out: (out / "data.txt").write_text("data"))
    index, _, _ = store.make_sealed("scores", lambda out: store.write_index(out, [part]), logs=(store.LOCATIONS,))
    with Cache(str(tmp_path / "cache")) as cache:
        cache["index"] = _entry(index)
    assert local_cache.forget_lost_artifacts(str(tmp_path / "cache")) == 0
    shutil.rmtree(part.uri)
    assert local_cache.forget_lost_artifacts(str(tmp_path / "cache")) == 1
