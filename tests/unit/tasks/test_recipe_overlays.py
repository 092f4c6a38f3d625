"""A recipe may be an overlay on another, from which it takes all other values."""

from __future__ import annotations

import pytest
import yaml

from model.plan.planner import load_sections
from model.recipe_yaml import read_recipe
from model.stages import training_stages
from tasks.recipe import RECIPES, load_recipe

ABLATIONS = sorted(path.stem for path in (RECIPES / "ablations").glob("*.yaml"))


def write(path, **values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def different(one, other, above=()):
    """Dotted keys in which two mappings differ."""
    result = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result |= different(a, b, (*above, key))
        elif a != b:
            result.add(".".join((*above, key)))
    return result


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("coupled_routing", {"model.routing"}),
        ("token_choice", {"model.routing", "train.losses.load_balance"}),
        ("dense_ffn", {"model.routing"}),
        ("adamw_alone", {"train.optim.matrices", "train.optim.adamw_lr"}),
    ],
)
def test_an_ablation_changes_only_what_its_name_says(name, keys):
    tiny, ablation = load_recipe("tiny"), load_recipe(f"ablations/{name}")
    assert ablation.name == name
    assert different(tiny.model_dump(), ablation.model_dump()) == {"name"} | keys
    assert ablation.model.is_ablation == (name != "adamw_alone")


def test_all_shipped_ablations_are_tested():
    assert ABLATIONS == ["adamw_alone", "coupled_routing", "dense_ffn", "token_choice"]


def test_token_choice_takes_as_many_experts_as_meet_a_token_at_each_stage():
    recipe = load_recipe("ablations/token_choice")
    assert [stage.model.capacity_factors for stage in training_stages(recipe.model, recipe.train)] == [4.0, 3.0, 2.0]


def test_the_dense_model_has_one_width_through_all_stages():
    recipe = load_recipe("ablations/dense_ffn")
    models = [stage.model for stage in training_stages(recipe.model, recipe.train)]
    assert models[0] == models[1] == models[2] and models[0].ffn_hidden(3) == 384


def test_an_overlay_joins_mappings_replaces_the_rest_and_takes_overrides(tmp_path):
    write(tmp_path / "bottom.yaml", name="bottom", a={"x": 1, "y": {"p": 1, "q": [1, 2]}}, b={"z": 1}, c=[1])
    write(tmp_path / "sub" / "middle.yaml", base="../bottom.yaml", name="middle", a={"y": {"q": [3]}}, d={"new": 1})
    top = write(tmp_path / "top.yaml", base="sub/middle.yaml", name="top", b=7)
    assert read_recipe(top) == {
        "name": "top",
        "a": {"x": 1, "y": {"p": 1, "q": [3]}},
        "b": 7,
        "c": [1],
        "d": {"new": 1},
    }
    mine = write(tmp_path / "mine.yaml", base=str(RECIPES / "tiny.yaml"), name="mine", train={"seed": 3})
    recipe = load_recipe(mine, ["train.stages[0].steps=7"])
    tiny = load_recipe("tiny")
    assert (recipe.train.seed, recipe.train.stages[0].steps, recipe.train.stages[1:]) == (3, 7, tiny.train.stages[1:])
    assert load_sections(mine)[1].seed == 3  # the planner reads it too


def test_an_overlays_mistakes_are_reported_like_those_of_any_recipe(tmp_path):
    mine = write(tmp_path / "mine.yaml", base=str(RECIPES / "tiny.yaml"), name="mine", train={"optim": {"muonlr": 3}})
    with pytest.raises(
        ValueError, match=r"recipe mine.yaml is not valid: train.optim.muonlr: unknown key; did you mean"
    ):
        load_recipe(mine)
    with pytest.raises(ValueError, match=r"model.routing.knd: unknown key; did you mean 'kind'"):
        load_recipe("tiny", ["model.routing.knd=dense"])


def test_bases_that_lead_nowhere_are_refused(tmp_path):
    first = write(tmp_path / "first.yaml", base="second.yaml", name="first")
    write(tmp_path / "second.yaml", base="first.yaml", name="second")
    with pytest.raises(ValueError, match="the bases form a cycle: first.yaml -> second.yaml -> first.yaml"):
        load_recipe(first)
    (tmp_path / "secret").write_text("name: secret")
    for base in ("gone.yaml", 3, ".", "secret", "../tiny", str(tmp_path / "first.yaml"), "/etc/passwd"):
        with pytest.raises(ValueError, match=f"base={base!r} must be the path of a recipe file, as seen from"):
            load_recipe(write(tmp_path / "bad.yaml", base=base, name="bad"))
    with pytest.raises(ValueError, match="an overlay needs its own name"):
        load_recipe(write(tmp_path / "bad.yaml", base="first.yaml"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.losses.load_balance=0.01"],
            "train.losses.load_balance=0.01 must be 0 with model.routing.kind='expert_",
        ),
        (
            ["model.routing.kind=token_choice", "train.stages[0].capacity_factors=2.5"],
            r"train.stages\[0\].*whole number",
        ),
        (
            ["model.routing.kind=dense", "train.expert_parallel=2", "train.nproc_per_node=2"],
            "train.expert_parallel=2 shares out experts, and model.routing.kind='dense' has none",
        ),
    ],
)
def test_what_does_not_go_with_an_ablation_is_refused(overrides, expected):
    with pytest.raises(ValueError, match=expected):
        load_recipe("tiny", overrides)


@pytest.mark.parametrize("kind", ["expert_choice", "token_choice"])
def test_experts_that_choose_and_that_are_chosen_can_be_shared_out(kind):
    overrides = [f"model.routing.kind={kind}", "train.expert_parallel=2", "train.nproc_per_node=2"]
    assert load_recipe("tiny", overrides).train.expert_parallel == 2
