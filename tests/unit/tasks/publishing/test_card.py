"""The model card states what recipe, scorecard and lineage say, and escapes markup in data."""

from __future__ import annotations

import copy
import re

import pytest
import yaml

from tasks.publishing.card import model_card
from tasks.recipe import load_recipe

LINEAGE = [
    {"kind": "merged", "digest": "a" * 64, "counts": {}, "code_version": "0.1.0"},
    {"kind": "records", "digest": "b" * 64, "counts": {"records": 20000}, "code_version": "0.1.0+abc"},
]


def score(mean: float, std: float | None = 0.012, **more) -> dict:
    return {"mean": mean, "std": std, "runs": 3, "seeds": [0, 1, 2], "interval": [mean - 0.05, mean + 0.05], **more}


SCORECARD = {
    "name": "shapes",
    "benchmark": "shapes",
    "overall": score(0.812, noise={"sampling": 0.006, "prompts": 0.021, "training": None, "training_runs": 0}),
    "tasks": {
        "colors": score(0.95, prompts=22, images=66, correct=62),
        "position": score(0.7, None, prompts=9, images=9),
    },
    "held_out": {"overall": score(0.444), "tasks": {"colors": score(0.5, prompts=2, images=6)}},
    "counts": {"expected": 100, "generated": 99, "scored": 99, "failed": 1},
    "seeds": [0, 1, 2],
    "interval": {"method": "Wilson", "level": 0.95},
}


@pytest.fixture(scope="module")
def recipe() -> dict:
    return load_recipe("tiny").model_dump(mode="json")


def header(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_header_is_what_the_hub_reads(recipe):
    fields = header(model_card(recipe, SCORECARD, LINEAGE))
    assert fields["license"] == recipe["publish"]["license"]
    assert fields["library_name"] == "diffusers" and fields["pipeline_tag"] == "text-to-image"


def test_the_usage_code_compiles_and_gives_the_recipes_size_steps_and_guidance(recipe):
    card = model_card(recipe, SCORECARD, LINEAGE)
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    compile(code, "card", "exec")
    for line in (
        f"height={recipe['eval']['image_size_px']},",
        f"width={recipe['eval']['image_size_px']},",
        f"num_inference_steps={recipe['eval']['num_inference_steps']},",
        f"guidance_scale={recipe['eval']['guidance_scale']},",
        "pipe.transformer.enable_cache(TextKVCacheConfig())",
    ):
        assert line in code
    assert "return_index" not in code  # the default is what was trained


def test_another_hidden_state_than_the_pipelines_default_is_in_the_usage_code(recipe):
    changed = copy.deepcopy(recipe)
    changed["encoding"]["hidden_state_index"] = -4
    code = re.search(r"```python\n(.*?)```", model_card(changed, None, []), re.S).group(1)
    compile(code, "card", "exec")
    assert "return_index=-4," in code


def test_scores_have_their_error_bars_seeds_and_counts(recipe):
    card = model_card(recipe, SCORECARD, LINEAGE)
    assert "| colors | 0.950 | 0.012 | 0.900 to 1.000 | 22 | 66 |" in card
    assert "| position | 0.700 | one run | 0.650 to 0.750 | 9 | 9 |" in card
    assert "| **overall** | 0.812 | 0.012 | 0.762 to 0.862 |" in card
    assert "3 runs (seeds 0, 1, 2); 99 of 100 images scored, 1 failed" in card
    assert "| **overall** | 0.444 |" in card.split("Held-out prompts")[1]


def test_a_pipeline_without_scores_says_so(recipe):
    card = model_card(recipe, None, LINEAGE)
    assert "Not scored." in card and "Nothing here was measured." in card and "0.812" not in card


def test_the_lineage_has_every_digest_in_full(recipe):
    card = model_card(recipe, SCORECARD, LINEAGE)
    assert f"| merged | `{'a' * 64}` |" in card
    assert f"| records | `{'b' * 64}` | 20,000 records | 0.1.0+abc |" in card
    assert "the source directories are not sealed" in model_card(recipe, SCORECARD, [])


def test_the_card_states_the_stages_and_their_optimizer(recipe):
    card = model_card(recipe, SCORECARD, LINEAGE)
    for stage in recipe["train"]["stages"]:
        assert f"| {stage['image_size_px']} | {stage['steps']:,} | {stage['batch_size']:,} |" in card
    assert f"Muon (rate {recipe['train']['optim']['muon_lr']:g}" in card


def test_the_17b_card_names_its_pinned_parts_and_its_capacities():
    recipe = load_recipe("nucleus_17b").model_dump(mode="json")
    card = model_card(recipe, None, [])
    assert f"`{recipe['components']['hub_vae']['revision']}`" in card
    assert f"`{recipe['components']['hub_text_encoder']['revision']}`" in card
    assert "32 blocks (3 dense, 29 MoE), width 2048, 16 heads (4 KV) of 128, 64 routed experts" in card
    assert "4 to 2 by layer" in card and "under their own licences" in card


def test_the_grid_is_shown_only_where_there_is_one(recipe):
    assert "(grid.png)" in model_card(recipe, SCORECARD, LINEAGE, has_grid=True)
    assert "grid.png" not in model_card(recipe, SCORECARD, LINEAGE)


def test_what_comes_from_data_is_text_and_never_markup(recipe):
    evil = copy.deepcopy(recipe)
    evil["publish"]["title"] = "x\n---\n# <script>alert(1)</script> ![a](http://evil)"
    evil["publish"]["license"] = "mit\nextra: true"
    rows = [{"kind": "<b>", "digest": "c" * 64, "counts": {"a|b": 1}, "code_version": "`x`"}]
    card = model_card(evil, {**SCORECARD, "name": "<img src=x>", "benchmark": "<img src=x>"}, rows)
    assert "<script" not in card and "<img" not in card and "<b>" not in card
    assert not re.search(r"(?<!\\)\]\(http://evil", card) and "![a](" not in card
    assert header(card)["license"] == "mit\nextra: true" and "extra" not in header(card)
    assert len(re.findall(r"(?m)^# ", card)) == 1


@pytest.mark.parametrize(
    "carried, expected", [(True, "warm-up, then constant"), (False, "warm-up in each stage, then constant")]
)
def test_the_card_states_whether_each_stage_warms_up(recipe, carried, expected):
    changed = {**recipe, "train": {**recipe["train"], "carry_optimizer": carried}}
    assert expected in model_card(changed, SCORECARD, LINEAGE)


def test_the_card_gives_the_noise_of_sampling_prompts_and_training_separately_with_commands(recipe):
    card = model_card(recipe, SCORECARD, LINEAGE)
    for part in (
        "| noise on the same prompts | 0.006 | `pyflyte run workflows/evaluate.py",
        "| prompts of the same kind | 0.021 |",
        "these weights are one training, seed 0 | `pyflyte run workflows/study.py study --recipe tiny",
    ):
        assert part in card
    known = copy.deepcopy(SCORECARD)
    known["overall"]["noise"] = {"sampling": None, "prompts": 0.021, "training": 0.017, "training_runs": 5}
    card = model_card(recipe, known, LINEAGE)
    assert "| training seeds | 0.017 over 5 trainings |" in card and "same prompts | not measured |" in card


def test_the_card_states_decay_and_trained_in_guidance_only_if_used(recipe):
    ends = copy.deepcopy(recipe)
    ends["train"]["stages"][-1] |= {"decay": {"steps": 1200, "to": 0.02}, "guidance": {"steps": 900, "scale": 3.5}}
    plain = copy.deepcopy(recipe)
    plain["train"]["stages"][-1] |= {"decay": None, "guidance": None}
    with_ends, without = (model_card(each, SCORECARD, LINEAGE) for each in (ends, plain))
    assert "then constant, falling linearly to 2% over the last 1,200 steps of stage3\\_64px" in with_ends
    assert "Guidance of scale 3.5 trained in" in with_ends and "last 900 steps" in with_ends
    assert "instead of a learning-rate decay" in without and "instead of" not in with_ends
    assert "falling linearly" not in without and "trained in (" not in without
