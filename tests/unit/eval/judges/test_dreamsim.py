"""OneIG's judge of diversity: the package's own model, small and random, without its downloads."""

import json
from importlib.util import find_spec

import pytest
from PIL import Image
from tiny_judges import picture
from tiny_packages import ALPHA, PROJECTION, RANK, WIDTH, load_dreamsim, small_dreamsim, write_dreamsim

from eval.benchmarks import registry as benchmarks
from eval.judges import dreamsim, pins, registry
from eval.judges.dreamsim import DreamSim, add_lora
from eval.judging.protocols import Request, score_name

pytestmark = pytest.mark.skipif(find_spec("dreamsim") is None, reason="dreamsim is not installed (no-deps.txt)")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_dreamsim(tmp_path_factory.mktemp("dreamsim"))


@pytest.fixture(scope="module")
def model(release):
    return load_dreamsim(release)


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

    def refuse(*args, **kwargs):
        raise AssertionError("torch.hub is called")

    for name in ("load", "set_dir", "download_url_to_file", "load_state_dict_from_url"):
        monkeypatch.setattr(torch.hub, name, refuse)
    folder, model = release, load_dreamsim(release)
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
    config = json.loads((release / dreamsim.ADAPTER[0]).read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        add_lora(model, tmp_path / "config.json", release / dreamsim.ADAPTER[1])


def test_only_the_pinned_release_has_the_official_name(release, monkeypatch, tmp_path):
    opened = dreamsim.dreamsim_package

    class Small:
        def __enter__(self):
            self.context = opened()
            return small_dreamsim(self.context.__enter__())

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(dreamsim, "dreamsim_package", Small)
    monkeypatch.setattr(pins, "PINS", tmp_path / "pins.json")
    oneig = benchmarks.load("oneig")

    def official():
        judge = registry.load(f"dreamsim@{release}")
        others = {skill: {"name": "official", "model": model} for skill, model in oneig.judges.items()}
        return score_name(oneig, others | {"diversity": {"name": judge.name, "model": judge.model}}) == "oneig"

    assert not official()
    assert pins.main(["dreamsim", str(release)]) == 0
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
