"""DPG-Bench's judge: modelscope's own class, small and random, against the package's own preprocessing and decoding."""

import ast
import json
import os
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union

import pytest
from PIL import Image
from tiny_judges import picture
from tiny_packages import VOCABULARY, load_mplug, write_mplug, write_mplug_settings
from torchvision_by_definition import transforms

from eval import dpg
from eval.benchmarks import registry as benchmarks
from eval.judges import mplug, pins, registry
from eval.judges.base import package_folder
from eval.judges.mplug import MPlug, build, load_weights, mplug_package
from eval.judges.stand_ins import module
from eval.judging.protocols import Request, score_name

pytestmark = pytest.mark.skipif(find_spec("modelscope") is None, reason="modelscope is not installed (no-deps.txt)")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_mplug(tmp_path_factory.mktemp("mplug"))


@pytest.fixture(scope="module")
def model(release):
    return load_mplug(release)


@pytest.fixture(scope="module")
def judge(model):
    return MPlug.of(model, "tiny")


def packages_preprocessor(source, folder):
    """The package's MPlugPreprocessor, by its own lines: its module imports a reader of videos that is not installed."""
    import torch

    (definition,) = [
        node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") == "MPlugPreprocessor"
    ]
    definition.decorator_list = []
    read = lambda path: SimpleNamespace(**json.loads(Path(path).read_text()))  # noqa: E731
    names = {
        "Preprocessor": object, "torch": torch, "osp": os.path, "Image": Image,
        "Any": Any, "Dict": dict, "Tuple": tuple, "Union": Union,
        "ModeKeys": SimpleNamespace(INFERENCE="inference"), "Config": SimpleNamespace(from_file=read),
        "ModelFile": SimpleNamespace(CONFIGURATION="configuration.json"),
        "Tasks": SimpleNamespace(image_captioning="image-captioning", image_text_retrieval="image-text-retrieval"),
    }  # fmt: skip
    exec(compile(ast.Module([definition], type_ignores=[]), "multi_modal.py", "exec"), names)
    return names["MPlugPreprocessor"](str(folder))


QUESTIONS = ["Is there a DOG?", "two cats on the red dog " * 8 + "?", "the", "is the cat on a red dog ?", "a b c"]


def test_answers_are_those_of_the_packages_own_preprocessing_and_decoding(judge, model, release, monkeypatch):
    import torch

    source = package_folder("modelscope", "modelscope") / "preprocessors" / "multi_modal.py"
    with mplug_package() as package, monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", module("torchvision", transforms=transforms()))
        mplug_folder = module("modelscope.models.multi_modal.mplug", CONFIG_NAME="config.yaml", MPlugConfig=package.MPlugConfig)  # fmt: skip
        patch.setitem(sys.modules, "modelscope.models.multi_modal.mplug", mplug_folder)
        preprocess = packages_preprocessor(source, release)
        pairs = [(picture(70, 60, seed), question) for seed in range(2) for question in QUESTIONS]
        inputs = [preprocess({"image": image, "question": question}) for image, question in pairs]
    expected = []
    for (image, question), given in zip(pairs, inputs, strict=True):
        pixels, tokens = judge.inputs(image, question)
        assert torch.equal(pixels, given["image"]) and pixels.shape == (1, 3, 56, 56)
        assert dict(tokens).keys() >= {"input_ids", "attention_mask"}
        assert all(torch.equal(tokens[name], given["question"][name]) for name in ("input_ids", "attention_mask"))
        ids, _ = model(given["image"], given["question"], train=False)
        expected.append(model.tokenizer.decode(ids[0][0], skip_special_tokens=True))  # MPlugForAllTasks.forward
    assert judge.answer([Request([image], question) for image, question in pairs]) == expected
    assert len(set(expected)) > 2  # they depend on what is asked


def test_case_and_words_after_the_25th_token_change_nothing(judge, model, monkeypatch):
    import torch

    said, tokenizer = [], model.tokenizer
    monkeypatch.setattr(model, "tokenizer", lambda text, **options: said.append(text) or tokenizer(text, **options))
    judge.inputs(picture(), "Is there a DOG?")
    assert said == ["is there a dog?"]  # whatever the checkpoint's tokenizer does
    start = "is there a dog on the red cat " * 4
    tokens = [judge.inputs(picture(), text)[1]["input_ids"] for text in (start + "no", (start + "two").upper())]
    assert tokens[0].shape == (1, 25) and torch.equal(*tokens)
    short, other = (judge.inputs(picture(), text)[1]["input_ids"] for text in ("a dog", "a cat"))
    assert not torch.equal(short, other)


def test_an_image_of_any_shape_becomes_a_square_of_the_whole_image(judge):
    """It is not cropped: the edges count."""
    edges = Image.new("RGB", (200, 50), (230, 10, 10))
    edges.paste((10, 10, 230), (0, 0, 60, 50))
    pixels, _ = judge.inputs(edges, "a")
    plain, _ = judge.inputs(Image.new("RGB", (200, 50), (230, 10, 10)), "a")
    assert pixels.shape == plain.shape == (1, 3, 56, 56)
    assert abs(float((pixels != plain).float().mean()) - 0.3) < 0.1


def test_only_the_word_yes_alone_scores(judge, model, monkeypatch):
    import torch

    ids = {word: VOCABULARY.index(word) for word in ("[CLS]", "[SEP]", "yes", "no", "dog")}
    scores = []
    for said in (["yes"], ["no"], ["yes", "dog"]):
        tokens = torch.tensor([ids[word] for word in ("[CLS]", *said, "[SEP]")])
        monkeypatch.setattr(model, "generation", lambda *states, tokens=tokens: ([[tokens]], None))
        (answer,) = judge.answer([Request([picture()], "Is there a dog?")])
        assert answer == " ".join(said)
        scores.append(dpg.score_sample({1: [answer]}, {1: [0]})["score"])
    assert scores == [1.0, 0.0, 0.0]


def test_what_a_mask_hides_from_the_decoder_changes_no_answer(model):
    """transformers 5 removed this attribute: states with mask 0 have no effect."""
    import torch

    torch.manual_seed(0)
    states, mask = torch.randn(1, 9, 32), torch.ones(1, 9, dtype=torch.long)
    hidden = torch.cat([states, 50 * torch.randn(1, 4, 32)], dim=1)
    cut = torch.cat([mask, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    (a, b, seen) = (model.generation(*inputs) for inputs in ((states, mask), (hidden, cut), (hidden, cut | 1)))
    assert torch.equal(a[0][0][0], b[0][0][0]) and float(a[1][0][0]) == pytest.approx(float(b[1][0][0]), abs=1e-5)
    assert float(a[1][0][0]) != pytest.approx(float(seen[1][0][0]), abs=1e-3)


def test_weights_are_those_of_the_file_and_none_may_be_absent(model, release, tmp_path):
    import torch

    state = torch.load(release / "pytorch_model.bin", weights_only=True)["model"]
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, own[name]) for name, tensor in state.items() if name in own)
    assert not [name for name in own if "_m." in name]  # training's copy takes no memory
    del state["model.fusion_encoder.encoder.layer.0.attention.self.query.weight"]
    torch.save(state, tmp_path / "less.bin")
    with pytest.raises(ValueError, match=r"less\.bin lacks 1 of \d+ parameters, such as fusion_encoder"):
        load_weights(model, tmp_path / "less.bin")


def test_code_in_the_releases_files_is_refused_and_does_not_run(model, release, tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="is not a file of weights"):
        load_weights(model, tmp_path / "pytorch_model.bin")
    write_mplug_settings(tmp_path)
    (tmp_path / "config.yaml").write_text(f'image_res: !!python/object/apply:os.system ["touch {tmp_path}/ran"]\n')
    with mplug_package() as package, pytest.raises(ValueError, match=r"config\.yaml is not a configuration of mPLUG"):
        build(package, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_only_the_pinned_release_has_the_official_name(release, monkeypatch, tmp_path):
    monkeypatch.setattr(pins, "PINS", tmp_path / "pins.json")
    benchmark = benchmarks.load("dpg")

    def score():
        judge = registry.load(f"mplug@{release}")
        return score_name(benchmark, {"vqa": {"name": judge.name, "model": judge.model}})

    assert score() == "dpg[mplug]"
    assert pins.main(["mplug", str(release)]) == 0
    assert score() == "dpg[mplug]"  # pinned, and yet too small to be the release
    monkeypatch.setattr(mplug, "RELEASED", {"image_res": 56})
    assert score() == "dpg"
    pinned = json.loads(pins.PINS.read_text())
    pins.PINS.write_text(json.dumps(pinned | {"mplug": pinned["mplug"] | {"vocab.txt": "0" * 64}}))
    assert score() == "dpg[mplug]"


def test_a_directory_without_the_release_is_one_clear_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(
        ValueError, match=r"judge mplug needs a directory with config\.yaml, .*, as mplug@DIR; .* has no"
    ):
        registry.load(f"mplug@{tmp_path}")
    assert pins.main(["mplug", str(tmp_path)]) == 1 and "has no config.yaml" in capsys.readouterr().err
    (tmp_path / "pins.json").write_text('{"mplug": 3}')
    with pytest.raises(ValueError, match=r"pins\.json is not the pins of judges"):
        pins.read_pins(tmp_path / "pins.json")
