"""Each task gets only the settings that it depends on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from diskcache import Cache
from flyteidl.core import literals_pb2
from PIL import Image

from eval import catalog
from eval.judges.registry import JUDGES
from tasks import store
from tasks.curation import flow
from tasks.curation.config import SourceConfig
from tasks.curation.curated import open_curated
from tasks.manifest import seal, writing
from tasks.planning import local_cache, task
from tasks.planning.local_run import check_directories
from tasks.planning.sections import check_ranks, check_tiers, check_workflow, for_own_images, stages
from tasks.recipe import load_recipe


def test_another_stages_steps_do_not_touch_this_stage():
    before = load_recipe("tiny")
    after = load_recipe("tiny", ["train.stages[2].steps=3999"])
    assert [one == other for one, other in zip(stages(before), stages(after))] == [True, True, False]


def test_own_images_keep_long_captions_and_every_shape_and_need_no_psnr_and_change_nothing_else():
    recipe = load_recipe("tiny")
    own = for_own_images(recipe)
    assert own.curation.captions.max_words == 60 and own.components.min_psnr_db == 0.0
    assert own.curation.captions.max_words + 2 <= recipe.encoding.max_text_tokens
    assert own.encoding == recipe.encoding.model_copy(update={"shapes": "data"})
    assert own.eval.benchmark == "captions" and own.eval.judges == {} and own.eval.prompts_per_task is None
    assert own.eval.guidance_scale == recipe.eval.guidance_scale and own.eval.seeds == recipe.eval.seeds
    check_workflow(own)
    further = load_recipe("tiny", ["eval.further_benchmarks=[captions,geneval2]"])
    assert for_own_images(further).eval.further_benchmarks == ("geneval2",)  # captions is scored once
    assert (own.source.scenes, own.source.digits, own.source.made) == (0, 0, {})  # the card describes the corpus
    parts = {name: getattr(recipe, name) for name in ("source", "curation", "components", "encoding", "eval")}
    assert own.model_copy(update=parts) == recipe
    lifted = {"formats": own.curation.filters.formats, "max_aspect_ratio": 1e6}
    assert own.curation.filters == recipe.curation.filters.model_copy(update=lifted)
    assert set(own.curation.filters.formats) > set(recipe.curation.filters.formats)  # those of phones
    assert own.components.vae == recipe.components.vae


def test_each_stage_trains_at_its_own_capacity_and_seed():
    recipe = load_recipe("tiny")
    trained = [stage.train for stage in stages(recipe)]
    assert [s.model.capacity_factors for s in trained] == [s.capacity_factors for s in recipe.train.stages]
    assert len({s.seed for s in trained}) == 3
    assert not {s.seed for s in trained} & {s.train.seed for s in stages(load_recipe("tiny", ["train.seed=1"]))}


def test_only_the_stage_that_is_merged_keeps_more_than_its_last_checkpoint():
    recipe = load_recipe("nucleus_17b")
    assert [s.train.train.keep_checkpoints for s in stages(recipe)] == [1, 1, recipe.merge.last_n]


def test_only_the_first_stage_starts_from_released_weights(tmp_path):
    recipe = load_recipe("smoke", [f"train.init_from={tmp_path}"])
    assert [s.train.train.init_from for s in stages(recipe)] == [str(tmp_path), None, None]


@pytest.mark.parametrize(("recipe", "handed_on"), [
    ("nucleus_17b", [True, True, False]), ("smoke", [True, True, False]), ("tiny", [False] * 3),
])  # fmt: skip
def test_a_stage_hands_its_optimiser_state_on_where_the_next_continues_with_it(recipe, handed_on):
    assert [s.train.hand_on_optimizer for s in stages(load_recipe(recipe))] == handed_on


@pytest.mark.parametrize("count", [1, 2, 6])
def test_any_number_of_stages_is_laid_out(count):
    recipe = load_recipe("tiny")
    last = recipe.train.stages[-1]
    more = (last.model_copy(update={"name": f"more{i}"}) for i in range(3))
    entries = (*recipe.train.stages, *more)[:count]
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"stages": entries})})
    check_workflow(other)
    laid_out = stages(other)
    assert [s.train.stage for s in laid_out] == list(entries)
    assert len({s.train.seed for s in laid_out}) == count
    assert [s.train.train.keep_checkpoints for s in laid_out] == [1] * (count - 1) + [recipe.train.keep_checkpoints]


def test_tier_weights_that_leave_a_stage_without_images_are_refused_and_others_are_not():
    weights = "{A1: 1, A2: 0, A3: 0, A4: 0, A5: 0}"
    laid_out = stages(load_recipe("smoke", [f"train.stages[1].tier_weights={weights}"]))
    with pytest.raises(ValueError, match=r"stages\[1\].tier_weights draws from A1 alone.*A2: 5, A5: 1"):
        check_tiers({"A1": 0, "A2": 5, "A5": 1}, laid_out)
    check_tiers({"A1": 1, "A2": 5}, laid_out)
    check_tiers({"A5": 1}, stages(load_recipe("smoke")))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # Images would be scored with another text state than the one that was trained.
        (["encoding.hidden_state_index=-6"], "encoding.hidden_state_index=-6 must be -8"),
        (["eval.benchmark=geneval"], "eval.benchmark 'geneval' needs a judge for detector, color .*pretrain"),
        (
            ["eval.benchmark=dpg", "eval.judges.vqa=blip-vqa", "eval.prompt_set=development"],
            "eval.prompt_set: dpg has no development prompts",
        ),
        (["eval.prompts_file=/nowhere.jsonl"], "eval.prompts_file='/nowhere.jsonl' does not exist"),
    ],
)
def test_what_would_fail_or_mislead_after_training_is_refused_before_it(overrides, expected):
    with pytest.raises(ValueError, match=expected):
        check_workflow(load_recipe("tiny", overrides))


def test_experts_spread_over_ranks_are_not_refused():
    check_workflow(load_recipe("tiny", ["train.nproc_per_node=2", "train.expert_parallel=2"]))


@pytest.mark.parametrize("ends_in", ["pipeline", "scorecard", "merged"])
def test_the_17b_recipe_is_accepted_to_its_end_with_judges_for_every_skill(ends_in):
    recipe = load_recipe("nucleus_17b")
    check_workflow(recipe, ends_in)
    judges = catalog.judges_of(recipe.eval)
    assert recipe.eval.benchmark == "geneval" and judges.keys() == catalog.benchmark("geneval").judges.keys()
    assert all(skill in JUDGES[judge].skills for skill, judge in judges.items())
    other = load_recipe("nucleus_17b", ["eval.judges={}"])
    check_workflow(other, "merged")
    if ends_in != "merged":
        with pytest.raises(ValueError, match="eval.benchmark 'geneval' needs a judge for detector, color"):
            check_workflow(other, ends_in)


def test_an_ablation_may_end_in_merged_weights_but_not_with_another_text_state():
    check_workflow(load_recipe("ablations/token_choice"), "merged")
    with pytest.raises(ValueError, match="hidden_state_index=-6 must be -8"):  # grids are sampled in training too
        check_workflow(load_recipe("nucleus_17b", ["encoding.hidden_state_index=-6"]), "merged")


@pytest.mark.parametrize(
    ("recipe", "registered", "local", "expected"),
    [
        ("nucleus_17b", (1, 1), True, "8 x train.nproc_per_node=8 = 64, .* has 1 x 1 = 1 processes: set "
         "NUCLEUS_TRAIN_NNODES=8 NUCLEUS_TRAIN_NPROC=8 for pyflyte register or pyflyte run --remote"),
        ("nucleus_17b", (4, 8), False, "= 64, .* has 4 x 8 = 32 processes: .* for pyflyte register"),
        ("nucleus_17b", (16, 4), False, "has 16 x 4 = 64 processes: .* NUCLEUS_TRAIN_NPROC=8"),  # as many, smaller nodes
        ("tiny", (8, 8), False, "nnodes=1 x train.nproc_per_node=1 = 1, .* has 8 x 8 = 64 processes"),
        ("tiny", (1, 2), True, "NUCLEUS_TRAIN_NPROC=1 for pyflyte run, or change the recipe"),
        ("nucleus_17b", (8, 8), True, "NUCLEUS_TRAIN_NNODES=8: a local run trains on this machine alone"),
    ],
)  # fmt: skip
def test_a_training_of_other_ranks_than_its_task_has_is_refused_with_the_arithmetic(
    recipe, registered, local, expected
):
    with pytest.raises(ValueError, match=expected):
        check_ranks(load_recipe(recipe).train, *registered, local)


def test_ranks_that_fit_their_task_are_not_refused():
    for local in (True, False):
        check_ranks(load_recipe("tiny").train, 1, 1, local)
    check_ranks(load_recipe("nucleus_17b").train, 8, 8, False)
    other = load_recipe("nucleus_17b", ["train.nnodes=16", "train.nproc_per_node=4"])
    check_ranks(other.train, 16, 4, False)


def test_an_evaluation_is_not_refused_for_what_only_training_or_publishing_needs():
    check_workflow(load_recipe("ablations/token_choice"), "scorecard", starts_from="merged")
    with pytest.raises(ValueError, match="is an ablation"):
        check_workflow(load_recipe("ablations/token_choice"), "pipeline", starts_from="scorecard")


def test_a_home_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    good, bad = tmp_path / "good", tmp_path / "file" / "below"
    check_directories(good, good)
    with pytest.raises(ValueError, match="NUCLEUS_HOME=.*/file/below: artifacts cannot be written there"):
        check_directories(bad, good)
    with pytest.raises(ValueError, match="local cache .* cannot be written .*FLYTE_LOCAL_CACHE_ENABLED=false"):
        check_directories(good, bad)
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "false")
    check_directories(good, bad)


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


def test_own_images_may_be_of_the_formats_of_phones_unless_the_recipe_names_formats():
    own = for_own_images(load_recipe("smoke"))
    assert own.curation.filters.formats == ("JPEG", "PNG", "WEBP", "AVIF", "HEIF")
    named = for_own_images(load_recipe("smoke", ["curation.filters.formats=[PNG]"]))
    assert named.curation.filters.formats == ("PNG",)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["smoke", "tiny"])
def test_own_images_of_any_shape_are_kept_unless_a_limit_is_set(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    sizes = [(800, 200), (200, 1300), (640, 100), (300, 300)]
    source = tmp_path / "images"
    source.mkdir()
    noise = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = noise.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"picture {i}")
    kept = {}
    for name, overrides in (("any", []), ("limited", ["curation.filters.max_aspect_ratio=3"])):
        curation = for_own_images(load_recipe(recipe, overrides)).curation
        directory, _ = flow.curate_source(SourceConfig(), str(source), curation)
        kept[name] = sum(part.rows for part in open_curated(directory).parts())
    assert kept == {"any": 4, "limited": 1}


@pytest.mark.parametrize("by", ["resolve_recipe", "plan_benchmarks"])
def test_a_local_run_names_a_judges_absent_package_before_any_work(tmp_path, monkeypatch, by):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path))
    monkeypatch.setitem(JUDGES, "mplug", JUDGES["mplug"]._replace(packages=("no_such_package",)))
    changes = ["eval.benchmark=dpg", "eval.judges.vqa=mplug@weights", "eval.prompts_per_task=null"]
    with pytest.raises(Exception, match="needs no_such_package, which is not installed"):
        if by == "resolve_recipe":
            task.resolve_recipe.task_function(recipe="smoke", overrides=changes, source="", ends_in="scorecard")
        else:
            task.plan_benchmarks.task_function(
                model=None, benchmarks="dpg", recipe="smoke", overrides="", judges="vqa=mplug@weights"
            )


def test_further_benchmarks_are_planned_for_a_pipeline_alone_and_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path))
    monkeypatch.setattr(task, "_has_gpu", lambda: False)
    ask = {"recipe": "smoke", "overrides": ["eval.further_benchmarks=[geneval2, oneig-text]"], "source": ""}
    sections = task.resolve_recipe.task_function(**ask, ends_in="pipeline")
    assert sections.eval == load_recipe("smoke").eval
    assert [config.benchmark for config in sections.further_evals] == ["geneval2", "oneig-text"]
    assert sections.further_evals[1].judges == {"ocr": "pp-ocr"}  # without a GPU
    assert task.resolve_recipe.task_function(**ask, ends_in="scorecard").further_evals == []
    monkeypatch.setitem(JUDGES, "pp-ocr", JUDGES["pp-ocr"]._replace(packages=("no_such_package",)))
    with pytest.raises(Exception, match="'pp-ocr' needs no_such_package, which is not installed"):
        task.resolve_recipe.task_function(**ask, ends_in="pipeline")
