"""A recipe is checked before any work; a mistake gives one message with the key and the valid values."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from model.config import MergeConfig, TrainConfig
from tasks.recipe import RECIPES, load_recipe

SMALL = {
    "name": "small",
    "source": {"scenes": 10},
    "curation": {"tiers": {"accept_proxy": True}},
    "components": {"kind": "trained", "vae": {}, "text_encoder": {"hidden_size": 32}},
    "encoding": {},
    "model": {
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 12,
        "out_channels": 16,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 6, 6],
        "dense_moe_strategy": "leave_first_three_blocks_dense",
        "num_experts": 8,
        "capacity_factors": 2.0,
    },
    "train": {
        "stages": [
            {"name": "one", "image_size_px": 64, "steps": 10, "batch_size": 8, "capacity_factors": 4.0},
            {"name": "two", "image_size_px": 128, "steps": 10, "batch_size": 8, "capacity_factors": 2.0},
        ],
        "optim": {"muon_lr": 1e-3, "adamw_lr": 1e-3},
    },
    "merge": {"last_n": 4},
    "eval": {"image_size_px": 64},
    "publish": {},
}


def write(tmp_path: Path, data: dict | str) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return str(path)


@pytest.fixture
def small(tmp_path) -> str:
    return write(tmp_path, SMALL)


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    assert not isinstance(caught.value, ValidationError), "the user sees our sentence, not Pydantic's page"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_shipped_recipe_publishes_a_deterministic_sampler(name):
    """So that in `pipe(prompt, generator=g)` the generator decides the image."""
    assert not load_recipe(name).eval.scheduler.stochastic_sampling


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_loads_and_bears_its_files_name(name):
    assert load_recipe(name).name == name


def test_a_recipe_is_frozen(small):
    recipe = load_recipe(small)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.seed = 1


# Overrides


@pytest.mark.parametrize(
    ("override", "get", "want"),
    [
        ("train.stages[0].steps=200", lambda r: r.train.stages[0].steps, 200),
        ("train.stages[1].tier_weights={A1: 1.0}", lambda r: r.train.stages[1].tier_weights, {"A1": 1.0}),
        ("train.stages[1].tier_weights.A1=3", lambda r: r.train.stages[1].tier_weights["A1"], 3.0),
        ("train.optim.muon_lr=4e-3", lambda r: r.train.optim.muon_lr, 4e-3),
        ("train.stages[0].aspect_ratios=[1:1, 16:9]", lambda r: r.train.stages[0].aspect_ratios, ("1:1", "16:9")),
        ("train.losses.wavelet=0.1", lambda r: r.train.losses.wavelet, 0.1),
        ("curation.filters.min_side_px = 32", lambda r: r.curation.filters.min_side_px, 32),
        ("source.path=/data/images", lambda r: r.source.path, "/data/images"),
        ("train.local_batch_size=null", lambda r: r.train.local_batch_size, None),
        ("eval.seeds[2]=7", lambda r: r.eval.seeds, (0, 1, 7)),
        ("publish.title=Squares = circles", lambda r: r.publish.title, "Squares = circles"),
    ],
)
def test_an_override_sets_one_value(tmp_path, override, get, want):
    data = copy.deepcopy(SMALL)
    data["eval"]["seeds"] = [0, 1, 2]
    assert get(load_recipe(write(tmp_path, data), [override])) == want


def test_later_overrides_win_and_do_not_reach_the_file(small):
    before = Path(small).read_text()
    recipe = load_recipe(small, ["train.seed=1", "train.seed=2"])
    assert recipe.train.seed == 2 and Path(small).read_text() == before


@pytest.mark.parametrize(
    "override", ["train.seed", "=3", "train..seed=3", "train.stages[-1].steps=3", "train.stages[x].steps=3", "9a=1", ""]
)
def test_an_override_of_another_form_is_shown_the_right_one(small, override):
    message = refused(small, override)
    assert repr(override) in message and "train.stages[0].steps=200" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stages[2].steps=1", ["index [2] is out of range", "train.stages has 2 entries", "[0] to [1]"]),
        ("train.stagess[0].steps=1", ["train.stagess: unknown key", "did you mean 'stages'?"]),
        ("train.stages[0].step=1", ["train.stages[0].step: unknown key", "did you mean 'steps'?", "batch_size"]),
        ("trian.seed=1", ["trian: unknown key", "did you mean 'train'?"]),
        ("train.losses.wavlet=1", ["train.losses.wavlet: unknown key", "did you mean 'wavelet'?"]),
        ("train.seed[0]=1", ["train.seed is not a list"]),
        ("train.stages.steps=1", ["train.stages has no keys"]),
        ("name.first=x", ["name has no keys"]),
        ("train.stages=[", ["override 'train.stages=['", "is not valid YAML"]),
    ],
)
def test_an_override_of_an_unknown_key_lists_the_valid_ones(small, override, parts):
    message = refused(small, override)
    assert all(part in message for part in parts), message


# Keys and types


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda d: d["train"].update(sed=1),
            ["train.sed: unknown key", "did you mean 'seed'?", "checkpoint_every_steps"],
        ),
        (
            lambda d: d["train"]["stages"][1].update(batchsize=1),
            ["train.stages[1].batchsize", "did you mean 'batch_size'"],
        ),
        (lambda d: d.update(traning={}), ["traning: unknown key", "did you mean 'train'?"]),
        (lambda d: d["components"]["vae"].update(zdim=1), ["components.vae.zdim", "did you mean 'z_dim'?"]),
        (lambda d: d["train"].update(qqqq=1), ["train.qqqq: unknown key (valid: "]),
        (lambda d: d["train"]["optim"].pop("muon_lr"), ["train.optim.muon_lr: Field required"]),
        (lambda d: d.pop("eval"), ["eval: Field required"]),
        (lambda d: d["train"].update(seed="many"), ["train.seed: Input should be a valid integer", "(got 'many')"]),
        (lambda d: d["train"]["stages"][0].update(steps=1.5), ["train.stages[0].steps: ", "integer", "(got 1.5)"]),
        (lambda d: d["train"]["stages"][0].update(steps=-3), ["train.stages[0].steps: ", "greater than 0", "(got -3)"]),
        (
            lambda d: d["train"]["stages"][0].update(decay={"steps": 10**6}),
            ["train.stages[0]", "decay.steps=1000000 must be at most the stage's steps="],
        ),
        (
            lambda d: d["train"]["stages"][0].update(guidance={"steps": 1, "scale": 1.0}),
            ["train.stages[0].guidance: ", "scale and autoguidance are 1", "set one above 1, or guidance: null"],
        ),
        (lambda d: d["train"].update(dtype="float64"), ["train.dtype: ", "'float32' or 'bfloat16'", "(got 'float64')"]),
        (lambda d: d["train"].update(stages={}), ["train.stages: ", "tuple"]),
        (lambda d: d["train"].update(stages=[]), ["train.stages: ", "at least 1 item"]),
        (lambda d: d.update(train=3), ["train: ", "(got 3)"]),
        (
            lambda d: d["train"]["stages"][0].update(capacity_factors="big"),
            ["train.stages[0].capacity_factors: ", "valid number", " or ", "valid tuple", "(got 'big')"],
        ),
        (
            lambda d: d["train"]["stages"][0].update(tier_weights={"A1": -1}),
            ["train.stages[0].tier_weights.A1: ", "greater than or equal to 0", "(got -1)"],
        ),
        (
            lambda d: d["components"].update(kind="hub", hub_vae={"repo_id": "a/b", "revision": "main"}),
            ["components.hub_vae.revision: ", "[0-9a-f]{40}", "(got 'main')"],
        ),
        (lambda d: d["publish"].update(s3_uri="http://x"), ["publish: s3_uri='http://x' must start with s3://"]),
    ],
)
def test_a_wrong_key_or_type_is_named_with_what_is_valid(tmp_path, change, parts):
    data = copy.deepcopy(SMALL)
    change(data)
    message = refused(write(tmp_path, data))
    assert message.startswith("recipe small.yaml is not valid: ")
    assert all(part in message for part in parts), message
    assert not re.search(r"capacity_factors\.\w|validation error|pydantic", message)


def test_all_mistakes_are_in_the_one_message(small):
    message = refused(small, "train.seed=many", "eval.batch_size=0")
    assert "train.seed: " in message and "eval.batch_size: " in message


# Impossible values


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["train.expert_parallel=3", "train.nproc_per_node=3"],
            ["train.expert_parallel=3 must divide model.num_experts=8"],
        ),
        (["train.expert_parallel=4"], ["train.expert_parallel=4 must divide the 1 ranks", "train.nproc_per_node=1"]),
        (
            ["train.stages[0].capacity_factors=0.25"],
            [
                "train.stages[0].capacity_factors=0.25 at layer 3",
                "0.50 tokens for each of 8 experts",
                "at least 0.5 is",
            ],
        ),
        (
            ["model.num_layers=5", "train.stages[1].capacity_factors=[1, 1, 1, 2]"],
            ["train.stages[1].capacity_factors: capacity_factors has 4 values", "each of the 5 layers"],
        ),
        (
            ["train.stages[0].capacity_factors=9"],
            ["train.stages[0].capacity_factors: capacity factor 9.0 must be in (0, num_experts=8]"],
        ),
        (
            ["train.stages[0].image_size_px=60"],
            ["train.stages[0].image_size_px=60 must be a multiple of 16", "such as 48 or 64"],
        ),
        (["eval.image_size_px=8"], ["eval.image_size_px=8 must be a multiple of 16", "such as 16"]),
        (
            ["train.nproc_per_node=3"],
            [
                "train.stages[0].batch_size=8 must be a multiple of the 3 ranks",
                "train.nnodes=1 x train.nproc_per_node=3",
            ],
        ),
        (["train.local_batch_size=3"], ["train.stages[0].batch_size=8", "train.local_batch_size=3"]),
        (["model.axes_dims_rope=[4, 4, 4]"], ["model: axes_dims_rope=[4, 4, 4] must sum to attention_head_dim=16"]),
        (["model.num_key_value_heads=5"], ["model: num_key_value_heads=5 must divide num_attention_heads=12"]),
        (["model.in_channels=16"], ["model.in_channels=16 must be 64"]),
        (["model.out_channels=64"], ["model.out_channels=64 must be 16"]),
        (
            ["model.joint_attention_dim=64"],
            ["model.joint_attention_dim=64 must be components.text_encoder.hidden_size=32"],
        ),
        (["encoding.hidden_state_index=-10"], ["encoding.hidden_state_index=-10 must be above"]),
        (["merge.last_n=20"], ["merge.last_n=20 must be at most train.keep_checkpoints=16"]),
        (
            ['train.stages[0].guidance={"steps":1,"scale":3.0,"autoguidance":1.5}'],
            [
                "stages[0].guidance.autoguidance=1.5",
                "is the first stage: leave it out there, or set it in a later stage",
            ],
        ),
        (["train.stages[1].image_size_px=32"], ["train: image_size_px must not fall", "[64, 32]"]),
        (["train.stages[1].name=one"], ["train: stages must have different names"]),
        (["train.stages[0].aspect_ratios=[wide]"], ["train.stages[0].aspect_ratios has 'wide'", "such as 16:9"]),
        (["train.stages[0].aspect_ratios=[0:1]"], ["train.stages[0].aspect_ratios has '0:1'"]),
        (["train.stages[0].tier_weights={A6: 1}"], ["train.stages[0].tier_weights has the tier 'A6'", "A1, A2"]),
        (["train.stages[0].tier_weights={A1: 0}"], ["train.stages[0].tier_weights draws nothing"]),
        (["components.kind=hub"], ["components: ", "'hub'", "'hub_vae'"]),
        (["components.vae.image_size_px=72"], ["components.vae.image_size_px=72 must be a multiple of 16"]),
        (["components.vae.aspect_ratios=[]"], ["components.vae.aspect_ratios has ''", "such as 16:9"]),
        (["components.text_encoder.vocab_size=5"], ["components.text_encoder.vocab_size=5 must be at least "]),
        (["curation.scorers.nsfw=clip"], ["curation.scorers.nsfw='clip' is unknown; use one of none"]),
        (["curation.filters.formats=[JPG]"], ["curation.filters.formats has 'JPG'; valid are JPEG, PNG"]),
        (["curation.filters.modes=[RGB, rgb]"], ["curation.filters.modes has 'rgb'"]),
        (["curation.tiers.thresholds=[1, 2, 3, 4]"], ["curation.tiers.thresholds=[1.0, 2.0, 3.0, 4.0] must fall"]),
    ],
)
def test_an_impossible_value_is_refused_with_what_would_be_valid(small, overrides, parts):
    message = refused(small, *overrides)
    assert all(part in message for part in parts), message


# Files


def test_an_unknown_name_lists_the_known_ones_and_guesses(small):
    message = refused("nucleus_17")
    assert "'nucleus_17' is neither one of " in message and "did you mean 'nucleus_17b'?" in message


def test_a_directory_is_not_a_recipe(tmp_path):
    assert "nor a file" in refused(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: [1, 2", "is not valid YAML"),
        ("train:\n\tseed: 1", "is not valid YAML"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
        ("train: {seed: 1}\nname: x\ntrain: {seed: 2}", "the key 'train' is given twice"),
        (b"name: \xff\xfe", "is not valid YAML"),
        ("", "must hold a mapping of sections, got NoneType"),
        ("- a\n- b", "must hold a mapping of sections, got list"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused_by_path(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and part in str(caught.value)


def test_numbers_and_ratios_are_read_as_they_are_written(tmp_path):
    text = (
        yaml.safe_dump(SMALL)
        .replace("muon_lr: 0.001", "muon_lr: 4e-3")
        .replace("name: one", "name: one\n    aspect_ratios: [1:1, 16:9, 9:16]")
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train.optim.muon_lr == 0.004
    assert recipe.train.stages[0].aspect_ratios == ("1:1", "16:9", "9:16")


# The 17B recipe


def test_the_17b_recipe_is_the_released_model():
    model = load_recipe("nucleus_17b").model
    assert (model.width, model.kv_heads, model.dense_inner_dim, model.num_layers) == (2048, 4, 5376, 32)
    assert [i for i in range(32) if not model.is_moe_layer(i)] == [0, 1, 2]
    assert {model.capacity_factor(i) for i in (3, 4)} == {4.0}
    assert {model.capacity_factor(i) for i in range(5, 32)} == {2.0}
    assert (model.num_experts, model.moe_intermediate_dim, model.route_scale) == (64, 1344, 2.5)


def test_the_17b_recipe_builds_the_released_parameters_in_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import NucleusMoEImageTransformer2DModel

    with torch.device("meta"):
        model = NucleusMoEImageTransformer2DModel(**load_recipe("nucleus_17b").model.model_dump(mode="json"))
    assert sum(p.numel() for p in model.parameters()) == 16_922_679_296
    assert len(model.state_dict()) == 610


def test_the_17b_recipe_trains_as_the_paper_says():
    recipe = load_recipe("nucleus_17b")
    train = recipe.train
    assert [(s.image_size_px, s.batch_size) for s in train.stages] == [(256, 4096), (512, 1024), (1024, 256)]
    assert [s.capacity_factors for s in train.stages] == [8.0, 4.0, recipe.model.capacity_factors]
    assert sum(s.steps for s in train.stages) == 1_700_000
    assert all(s.aspect_ratios == ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3") for s in train.stages)
    assert [s.wavelet for s in train.stages] == [False, False, True]
    losses = train.losses
    assert (losses.router_z_loss, losses.router_orthogonality, losses.wavelet) == (5e-7, 1e-7, 0.1)
    optim = train.optim
    assert (optim.muon_lr, optim.adamw_lr, optim.warmup_steps, optim.muon_momentum) == (1e-4, 1e-4, 1000, 0.95)
    t = train.timesteps
    assert (t.base_tokens, t.base_shift, t.max_tokens, t.max_shift, t.uniform_fraction) == (256, 0.5, 4096, 1.15, 0.1)
    assert (train.caption_dropout, recipe.merge.last_n) == (0.1, 16)
    assert (train.nnodes * train.nproc_per_node, train.expert_parallel, train.dtype) == (64, 8, "bfloat16")
    scores = recipe.eval
    assert (scores.benchmark, scores.num_inference_steps, scores.guidance_scale) == ("geneval", 50, 8.0)
    assert (scores.images_per_prompt, scores.image_size_px, len(scores.seeds)) == (4, 1024, 3)
    assert recipe.encoding.hidden_state_index == -8 and recipe.encoding.max_text_tokens == 1024
    assert recipe.components.hub_vae.repo_id == "Qwen/Qwen-Image"
    assert recipe.components.hub_text_encoder.repo_id == "Qwen/Qwen3-VL-8B-Instruct"


def test_every_number_of_the_17b_recipe_has_its_source_next_to_it():
    mark = re.compile(r"\[(paper|config|code|wsm|chosen)\]|\(\?\)")
    for line in (RECIPES / "nucleus_17b.yaml").read_text().splitlines():
        value, _, comment = line.partition("  #")
        if re.search(r":\s*[\[{]?-?\d", value):
            assert mark.search(comment), f"no source beside {value.strip()}"


@pytest.mark.parametrize("key", ["train.stages[1].steps", "eval.prompts_per_task", "source.scenes"])
def test_a_whole_number_beyond_what_tasks_can_exchange_is_refused_by_its_key(key):
    with pytest.raises(ValueError, match=rf"{re.escape(key)}=9{{20}} is too large"):
        load_recipe("smoke", [f"{key}={'9' * 20}"])


def test_a_model_of_very_many_layers_is_refused_at_once():
    with pytest.raises(ValueError, match="model.num_layers: Input should be less than or equal to 1024"):
        load_recipe("smoke", ["model.num_layers=99999999"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curation.captions.max_words=1e9", "curation.captions.max_words.*10000"),
        ("train.stages[0].aspect_ratios=['1000000:1']", "aspect_ratios has '1000000:1'; one side may be 16 times"),
        ("source.scene_size_px=1e7", "source.scene_size_px.*4096"),
        ("train.stages[0].image_size_px=16777216", "image_size_px.*16384"),
        ("eval.image_size_px=16777216", "eval.image_size_px.*16384"),
        ("train.seed=true", "train.seed=true must be a whole number"),
        ("components.seed=1.0", "components.seed=1.0 must be a whole number"),
        ("source.seed='1'", "source.seed='1' must be a whole number"),
        ("eval.seeds=[0, true]", r"eval.seeds\[1\]=true must be a whole number"),
        ("train.stages[0].steps=true", r"train.stages\[0\].steps=true must be a whole number"),
        ("components.min_psnr_db=true", "components.min_psnr_db=true must be a number"),
    ],
)
def test_absurd_numbers_are_refused_in_one_sentence(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("smoke", [override])
    assert "\n" not in str(error.value)


def test_whole_numbers_in_scientific_notation_are_still_read():
    assert load_recipe("smoke", ["train.stages[0].steps=1e2"]).train.stages[0].steps == 100


def test_the_schema_of_a_section_is_made_once_for_all_tasks_and_is_its_own():
    """flytekit requests it for each input of each task: a third of the time of `pyflyte run --help`."""
    first = TrainConfig.model_json_schema()
    assert TrainConfig.model_json_schema() is first and first["title"] == "TrainConfig"
    assert MergeConfig.model_json_schema()["title"] == "MergeConfig"
