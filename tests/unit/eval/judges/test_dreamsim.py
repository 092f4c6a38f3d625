"""OneIG's judge of diversity: the package's own model, small and random, without its downloads."""

import importlib
import json
from functools import partial
from importlib.util import find_spec

import pytest
from PIL import Image
from tiny_judges import picture

from eval.benchmarks import registry as benchmarks
from eval.judges import dreamsim, pins, registry
from eval.judges.dreamsim import DreamSim, add_lora, build, dreamsim_package
from eval.judging.protocols import Request, score_name

pytestmark = pytest.mark.skipif(find_spec("dreamsim") is None, reason="dreamsim is not installed (no-deps.txt)")

WIDTH, PROJECTION, RANK, ALPHA = 24, 16, 4, 2


def tower(package, patch_size=16):
    import torch

    transformer = importlib.import_module("dreamsim.feature_extraction.vision_transformer").VisionTransformer
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return transformer(
        img_size=[224], patch_size=patch_size, embed_dim=WIDTH, depth=12, num_heads=2, mlp_ratio=2, qkv_bias=True, norm_layer=norm
    )  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A directory of the release's files with small towers, and the function that builds its model."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("dreamsim")
    torch.manual_seed(0)

    def small(package):
        for name in ("vision_transformer", "load_clip_as_dino", "load_open_clip_as_dino"):
            module = importlib.import_module(f"dreamsim.feature_extraction.{name}")
            module.vit_base = partial(tower, package)
        package.EMBED_DIMS |= {"dino_vitb16": {"cls": WIDTH}}
        package.EMBED_DIMS |= {name: {"embedding": PROJECTION} for name in ("clip_vitb16", "open_clip_vitb16")}
        return package

    with dreamsim_package() as package:
        small(package)
        (folder / "checkpoints").mkdir()
        (folder / "ensemble_lora").mkdir()
        adapter = {}
        for index, name in enumerate(dreamsim.DreamSim.FILES[:3]):
            vit = tower(package)
            if index:
                vit.pos_drop = torch.nn.LayerNorm(WIDTH)
            for parameter in vit.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            state = vit.state_dict()
            torch.save(
                {"state_dict": {**state, "proj": torch.randn(WIDTH, PROJECTION)}} if index else state, folder / name
            )
            for block in range(12):
                layer = f"base_model.model.extractor_list.{index}.model.blocks.{block}.attn.qkv"
                adapter[f"{layer}.lora_A.weight"] = torch.randn(RANK, WIDTH) / 5
                adapter[f"{layer}.lora_B.weight"] = torch.randn(3 * WIDTH, RANK) / 5
        config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3, "bias": "none", "target_modules": ["qkv"], "peft_type": "LORA"}  # fmt: skip
        (folder / dreamsim.ADAPTER[0]).write_text(json.dumps(config))
        save_file(adapter, folder / dreamsim.ADAPTER[1])
    return folder, small


@pytest.fixture(scope="module")
def model(release):
    folder, small = release
    with dreamsim_package() as package:
        return build(small(package), folder, "cpu").eval()


def test_distances_are_those_of_the_packages_model_for_each_pair_in_order(model):
    import torch

    judge = DreamSim.of(model, "tiny")
    tiles = [picture(), Image.new("RGB", (60, 60), (230, 10, 10)), Image.linear_gradient("L").convert("RGB")]
    (distances,) = judge.answer([Request([*tiles[:1], Image.new("RGB", (96, 80)), *tiles[1:]], "")])  # a black tile

    def tensor(tile):
        """dreamsim()'s preprocessing: torchvision's Resize and ToTensor of a Pillow image."""
        values = torch.tensor(list(tile.resize((224, 224), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8)
        return values.view(224, 224, 3).permute(2, 0, 1).contiguous().to(torch.float32).div(255)[None]

    with torch.no_grad():
        expected = [model(tensor(a), tensor(b)).item() for a, b in (tiles[:2], tiles[::2], tiles[1:])]
    assert distances == expected and len(set(distances)) == 3 and min(distances) > 1e-3


def test_each_tile_is_embedded_once_and_one_tile_has_no_distance(model, monkeypatch):
    calls = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda pixels: calls.append(1) or embed(pixels))
    judge = DreamSim.of(model, "tiny")
    assert len(judge.answer([Request([picture(seed=i) for i in range(4)], "")])[0]) == 6 and len(calls) == 4
    assert judge.answer([Request([picture(), Image.new("RGB", (96, 80))], "")]) == [[]]
    judge.selftest()  # an image is at no distance from itself, with any weights


def test_every_weight_of_the_directory_is_in_the_model_and_torch_hub_is_not_called(release, monkeypatch):
    import torch
    from safetensors.torch import load_file

    folder, small = release

    def refuse(*args, **kwargs):
        raise AssertionError("torch.hub is called")

    for name in ("load", "set_dir", "download_url_to_file", "load_state_dict_from_url"):
        monkeypatch.setattr(torch.hub, name, refuse)
    with dreamsim_package() as package:
        model = build(small(package), folder, "cpu")
    adapter = load_file(folder / dreamsim.ADAPTER[1])
    for index, name in enumerate(DreamSim.FILES[:3]):
        state = torch.load(folder / name, weights_only=True)
        state = state.get("state_dict", state)
        extractor = model.extractor_list[index]
        assert not index or torch.equal(extractor.proj, state.pop("proj"))
        for block in range(12):
            key = f"blocks.{block}.attn.qkv"
            layer = extractor.model.get_submodule(key)
            a, b = (adapter[f"base_model.model.extractor_list.{index}.model.{key}.lora_{x}.weight"] for x in "AB")
            x = torch.randn(5, WIDTH)
            whole = state[f"{key}.weight"] + ALPHA / RANK * b @ a
            expected = torch.nn.functional.linear(x, whole, state[f"{key}.bias"])
            with torch.no_grad():
                assert torch.allclose(layer(x), expected, atol=1e-5)
        own = {name.replace(".qkv.base.", ".qkv."): t for name, t in extractor.model.state_dict().items()}
        assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "must be a plain LoRA"),
        ({"target_modules": ".*qkv"}, "must be a plain LoRA"),
        ({"target_modules": ["fc1"]}, "it has others: extractor_list"),
        ({"target_modules": ["kv"]}, "0 layers kv"),
    ],
)
def test_another_adapter_is_refused(release, model, tmp_path, changed, message):
    config = json.loads((release[0] / dreamsim.ADAPTER[0]).read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        add_lora(model, tmp_path / "config.json", release[0] / dreamsim.ADAPTER[1])


def test_only_the_pinned_release_has_the_official_name(release, monkeypatch, tmp_path):
    folder, small = release
    opened = dreamsim.dreamsim_package

    class Small:
        def __enter__(self):
            self.context = opened()
            return small(self.context.__enter__())

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(dreamsim, "dreamsim_package", Small)
    monkeypatch.setattr(pins, "PINS", tmp_path / "pins.json")
    oneig = benchmarks.load("oneig")

    def official():
        judge = registry.load(f"dreamsim@{folder}")
        others = {role: {"name": "official", "model": model} for role, model in oneig.judges.items()}
        return score_name(oneig, others | {"diversity": {"name": judge.name, "model": judge.model}}) == "oneig"

    assert not official()
    assert pins.main(["dreamsim", str(folder)]) == 0
    assert not official()  # pinned, and yet too narrow to be the release
    monkeypatch.setattr(dreamsim, "EMBEDDING_WIDTH", WIDTH + 2 * PROJECTION)
    assert official()
    monkeypatch.setattr(dreamsim, "RELEASE", "0.1.0")
    assert not official()


def test_a_directory_without_the_release_is_one_clear_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"judge dreamsim needs a directory with .*, as dreamsim@DIR; .* has no checkp"
    ):
        registry.load(f"dreamsim@{tmp_path}")
    with pytest.raises(ValueError, match="needs a directory"):
        registry.load("dreamsim")
