"""Arguments of a command become configurations and candidates, checked before any work."""

from __future__ import annotations

import json

import pytest

from eval.config import SCORING_KEYS, EvalConfig
from model.config import MergeConfig
from tasks.evaluation import models
from tasks.evaluation.models import Model
from tasks.evaluation.plan import default_benchmarks, further_configs, generation_config, plan_benchmarks
from tasks.manifest import seal
from tasks.planning.candidates import plan_candidates
from tasks.recipe import load_recipe

TINY = load_recipe("tiny", []).eval.model_dump(mode="json")
HUB = Model(place="a/b", digest="c" * 40)


def test_each_benchmark_has_its_own_counts_and_judges_and_shares_the_settings_of_sampling():
    configs = plan_benchmarks("shapes,geneval,geneval2", TINY, judges="geneval=ssd-mobilenet-v2")
    shapes, geneval, geneval2 = configs
    assert shapes == load_recipe("tiny", []).eval.model_copy(update={"judges": {"detector": "shapes-detector"}})
    assert geneval.images_per_prompt == 4 and geneval2.images_per_prompt == 1
    assert geneval.prompts_per_task is None and geneval.prompts_file is None
    assert geneval.judges == dict.fromkeys(("detector", "color"), "ssd-mobilenet-v2")
    assert geneval2.judges == {"soft_tifa": "qwen3-vl-8b"}
    assert {c.guidance_scale for c in configs} == {TINY["guidance_scale"]}


def test_the_17b_recipe_and_its_nightly_evaluation_have_both_headlines():
    config = load_recipe("nucleus_17b").eval
    (second,) = further_configs(config)
    assert (config.benchmark, second.benchmark, second.further_benchmarks) == ("geneval", "geneval2", ())
    assert second.judges == {"soft_tifa": "qwen3-vl-8b"} and second.images_per_prompt == 1
    shared = {"seeds", "image_size_px", "num_inference_steps", "guidance_scale", "scheduler", "prompt_set"}
    assert second.model_dump(include=shared) == config.model_dump(include=shared)
    assert default_benchmarks(config.model_dump(mode="json")) == "geneval,geneval2"
    assert default_benchmarks({}) == "geneval,geneval2"  # of a model that was not published here
    assert default_benchmarks(TINY) == "shapes" and further_configs(EvalConfig(**TINY)) == []
    captions = {**TINY, "benchmark": "captions"}  # whose prompts are of a corpus
    assert default_benchmarks(captions) == "geneval,geneval2"
    assert default_benchmarks({**captions, "further_benchmarks": ["dpg"]}) == "dpg"


def test_further_benchmarks_must_be_known_and_others():
    for further, message in (
        (["genval2"], "did you mean 'geneval2'"),
        (["geneval"], "names one twice, or benchmark again"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(benchmark="geneval", further_benchmarks=further)


def test_judges_are_the_official_classes_or_on_a_cpu_those_that_packages_carry():
    (official,), (packaged,) = plan_benchmarks("geneval", {}), plan_benchmarks("geneval", {}, packaged=True)
    assert official.judges["detector"] == "mask2former-clip" and packaged.judges["detector"] == "ssd-mobilenet-v2"
    (oneig,) = plan_benchmarks("oneig", {})
    assert oneig.judges == {
        "vqa": "qwen2.5-vl-7b",
        "ocr": "qwen2.5-vl-7b",
    }  # the other dimensions are left out, and said so
    (named,) = plan_benchmarks("geneval", {}, judges="geneval.color=xkcd-color,detector=ssd-mobilenet-v2")
    assert named.judges == {"detector": "ssd-mobilenet-v2", "color": "xkcd-color"}


def test_an_override_applies_to_all_benchmarks_or_to_the_one_it_names():
    shapes, geneval = plan_benchmarks(
        "shapes,geneval", {}, ["seeds=[5]", "geneval.guidance_scale=2", "eval.batch_size=3"]
    )
    assert shapes.seeds == geneval.seeds == (5,) and shapes.batch_size == 3
    assert geneval.guidance_scale == 2 and shapes.guidance_scale == EvalConfig().guidance_scale


@pytest.mark.parametrize(
    ("benchmarks", "overrides", "judges", "message"),
    [
        ("", [], "", "benchmarks is empty"),
        ("geneval,geneval", [], "", "names one twice"),
        ("genevl", [], "", "did you mean 'geneval'"),
        ("geneval", ["guidance"], "", "must look like guidance_scale=4"),
        ("geneval", ["guidence_scale=4"], "", "geneval: guidence_scale: Extra inputs"),
        ("geneval", ["guidance_scale=["], "", "is not YAML"),
        ("geneval", ["guidance_scale=fast"], "", "geneval: guidance_scale: .*number"),
        ("geneval", [], "ssd-mobilnet", "did you mean 'ssd-mobilenet-v2'"),
        ("geneval", [], "eye=ssd-mobilenet-v2", "the skill 'eye', and geneval has detector, color"),
        ("geneval", [], "dpg=blip-vqa", "the benchmarks are geneval"),
        ("module:missing", [], "", "cannot be imported"),
    ],
)  # fmt: skip
def test_impossible_plans_are_refused_with_the_name(benchmarks, overrides, judges, message):
    with pytest.raises(ValueError, match=message):
        plan_benchmarks(benchmarks, {}, overrides, judges)


def test_images_do_not_depend_on_settings_that_only_scoring_reads():
    config = EvalConfig(
        benchmark="geneval", judges={"detector": "ssd-mobilenet-v2"}, missing="official", judge_batch_size=3
    )
    plain = generation_config(config)
    assert plain == generation_config(EvalConfig(benchmark="geneval"))
    assert all(getattr(plain, key) == getattr(EvalConfig(), key) for key in SCORING_KEYS)


def sealed(path, kind, config=None):
    path.mkdir()
    (path / "file").write_text(kind)
    return path, seal(path, kind, config=config).digest


def test_merged_weights_need_their_components_and_have_both_digests(tmp_path):
    (merged, one), (components, other) = sealed(tmp_path / "m", "merged"), sealed(tmp_path / "c", "components")
    model = models.resolve(str(merged), components=str(components))
    assert model.digest == f"{one}+{other}" and model.digests() == {"merged": one, "components": other}
    (merged / "transformer").mkdir()
    with pytest.raises(ValueError, match="name its components too"):
        models.resolve(str(merged))
    with pytest.raises(ValueError, match="of kind 'components'; 'merged' is needed"):
        models.resolve(str(components), components=str(components))


def test_a_path_of_this_machine_is_refused_where_a_cluster_loads_it(tmp_path):
    with pytest.raises(ValueError, match=r"the cluster cannot read; give an s3:// URI"):
        models.resolve(str(tmp_path), local=False)
    with pytest.raises(ValueError, match="newest on your machine"):
        models.resolve("newest", local=False)


def test_a_published_pipeline_is_scored_with_the_settings_it_was_scored_with(tmp_path):
    path, digest = sealed(tmp_path / "p", "pipeline", {"recipe": {"eval": TINY}})
    model = models.resolve(str(path))
    assert model.digest == digest and models.published_settings(model) == TINY
    assert models.published_settings(HUB) is None


@pytest.mark.parametrize(
    "section",
    [
        {"benchmark": "shapes", "judges": {"detector": "antigravity:fly"}},
        {"benchmark": "antigravity:fly"},
        {"benchmark": "oneig", "judges": {"style": "llm2clip@" + "a" * 40}},
    ],
)
def test_a_published_pipeline_does_not_choose_what_is_imported_where_it_is_scored(tmp_path, section):
    path, _ = sealed(tmp_path / "p", "pipeline", {"recipe": {"eval": section}})
    with pytest.raises(ValueError, match="runs code that is not part of this package"):
        models.published_settings(models.resolve(str(path)))


def test_a_published_pipeline_does_not_choose_which_files_are_read_where_it_is_scored(tmp_path, capsys):
    """Whatever the manifest names: its prompts, rewrites and the weights of judges."""
    at_commit = "clip-color@" + "a" * 40
    judges = {"vqa": "mplug@/etc", "color": at_commit, "style": "csd@weights", "detector": "ssd-mobilenet-v2"}
    judges |= {"planted": "mplug@/tmp/planted@" + "a" * 40, "line": at_commit + "\n", "list": [at_commit]}
    section = {
        "benchmark": "geneval",
        "prompts_file": "/etc/passwd",
        "prompt_rewrites": "s3://b/x",
        "judges": judges,
        "seeds": [7],
    }
    path, _ = sealed(tmp_path / "p", "pipeline", {"recipe": {"eval": section}})
    settings = models.published_settings(models.resolve(str(path)))
    assert settings == {
        "benchmark": "geneval", "judges": {"color": at_commit, "detector": "ssd-mobilenet-v2"}, "seeds": [7],
    }  # fmt: skip
    assert (
        "for prompts_file, prompt_rewrites, judges.vqa, judges.style, judges.planted, judges.line, judges.list, which"
        in capsys.readouterr().out
    )


def test_what_was_published_last_on_s3_is_resolved_to_its_version(monkeypatch):
    pointer = {"digest": "d" * 64, "uri": "s3://bucket/pipeline/versions/" + "d" * 64, "manifest_sha256": ""}
    content = {"s3://bucket/pipeline/latest.json": json.dumps(pointer).encode()}
    monkeypatch.setattr(models.storage, "read_bytes", content.get)
    model = models.resolve("s3://bucket/pipeline", local=False)
    assert (model.place, model.digest) == (pointer["uri"], pointer["digest"])
    with pytest.raises(ValueError, match="neither a sealed directory"):
        models.resolve("s3://bucket/elsewhere")
    for changes in ({"digest": "../" * 9 + "tmp"}, {"digest": 7}, {"uri": "/etc"}, {"uri": "reference::s3://b"}):
        content["s3://bucket/pipeline/latest.json"] = json.dumps(pointer | changes).encode()
        with pytest.raises(ValueError, match="is not a pointer"):
            models.resolve("s3://bucket/pipeline")
    content["s3://bucket/pipeline/latest.json"] = b"{}"
    with pytest.raises(ValueError, match="is not a pointer"):
        models.resolve("s3://bucket/pipeline")


@pytest.fixture
def artifacts(tmp_path):
    """{kind: a sealed directory}"""
    return {kind: sealed(tmp_path / kind, kind)[0] for kind in ("merged", "components", "checkpoints", "pipeline")}


@pytest.mark.parametrize("of_model", [True, False])
def test_candidates_are_settings_merges_and_models_on_development_prompts(artifacts, of_model):
    """A pipeline's components are the model's, or given with it."""
    components = str(artifacts["components"])
    if of_model:
        model, given = models.resolve_incumbent(str(artifacts["merged"]), components=components), ""
    else:
        model, given = models.resolve_incumbent(str(artifacts["pipeline"]), components=components), components
    assert model.components == (components if of_model else "")
    places = [str(artifacts[kind]) for kind in ("merged", "checkpoints", "pipeline")]
    names = ["guidance_scale=3+num_inference_steps=5", "last_n=2", "last_n=3+guidance_scale=2", "x/y@" + "e" * 40, *places]  # fmt: skip
    planned = plan_candidates(model, "shapes", ",".join(names), "tiny", [], "", components=given)
    assert [c.name for c in planned] == ["incumbent", *names]
    incumbent, setting, window, both, other, merged, checkpoints, pipeline = planned
    assert incumbent.model == setting.model == model and incumbent.config.guidance_scale == TINY["guidance_scale"]
    assert all(c.config.prompt_set == "development" and (c.model is None) is not (c.merge is None) for c in planned)
    assert (setting.config.guidance_scale, setting.config.num_inference_steps) == (3, 5)
    recipe = load_recipe("tiny", [])
    assert window.merge.config == MergeConfig(**recipe.merge.model_dump() | {"last_n": 2})
    assert window.merge.transformer.capacity_factors == recipe.train.stages[-1].capacity_factors
    assert (window.merge.components, window.merge.checkpoints) == (components, "")
    assert both.merge.config.last_n == 3 and both.config.guidance_scale == 2
    assert other.model.digest == "e" * 40
    assert (merged.model.place, merged.model.components) == (places[0], components)
    assert checkpoints.merge == window.merge.model_copy(update={"config": recipe.merge, "checkpoints": places[1]})
    assert (pipeline.model.place, pipeline.model.components) == (places[2], "")
    assert all(c.config == incumbent.config for c in (window, other, merged, checkpoints, pipeline))


def test_merges_and_merged_weights_need_their_components(artifacts):
    pipeline = models.resolve_incumbent(str(artifacts["pipeline"]))
    for name in ("last_n=2", str(artifacts["checkpoints"]), str(artifacts["merged"])):
        with pytest.raises(ValueError, match=r"--components"):
            plan_candidates(pipeline, "shapes", name, "tiny", [], "")
    with pytest.raises(ValueError, match=r"merged is not a sealed directory of kind components"):
        plan_candidates(pipeline, "shapes", "last_n=2", "tiny", [], "", components=str(artifacts["merged"]))
    with pytest.raises(ValueError, match=r"candidate 'last_n=all': last_n: .*integer"):
        plan_candidates(pipeline, "shapes", "last_n=all", "tiny", [], "", components=str(artifacts["components"]))


@pytest.mark.parametrize(
    ("candidates", "recipe", "message"),
    [
        ("", "tiny", "must be different ones"),
        ("guidance_scale=3,guidance_scale=3", "tiny", "must be different ones"),
        ("last_n=4", "", "needs the components and the recipe"),
        ("guidance=3", "tiny", "guidance: Extra inputs"),
        ("./nowhere", "tiny", "neither a directory"),
    ],
)
def test_candidates_that_cannot_be_are_refused(candidates, recipe, message):
    with pytest.raises(ValueError, match=message):
        plan_candidates(HUB, "shapes", candidates, recipe, [], "")
