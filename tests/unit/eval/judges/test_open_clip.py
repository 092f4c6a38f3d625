"""GenEval's colours against open_clip's own code: a small random model of its class, its tokenizer, its transforms."""

import gzip
import importlib
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision_by_definition as by_definition
from PIL import Image
from tiny_judges import picture

from eval.benchmarks.geneval import CLASSES
from eval.geneval import COLORS, crop_object
from eval.judges.base import clip_pixels, package_folder
from eval.judges.clip_color import TEMPLATES, CLIPColors
from eval.judges.stand_ins import importable, module, package_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip_torch is not installed (no-deps.txt)"),
]

SIZE, PATCH, WIDTH, HEADS, LAYERS = 32, 8, 64, 4, 2


def torchvision():
    import torch

    functional = module("torchvision.transforms.functional", to_tensor=by_definition.to_tensor)
    transforms = by_definition.transforms()
    vars(transforms).update(dict.fromkeys(("RandomResizedCrop", "ColorJitter", "Grayscale")))  # of training
    return {
        "torchvision": module("torchvision"),
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
        "torchvision.ops": module("torchvision.ops"),
        "torchvision.ops.misc": module("torchvision.ops.misc", FrozenBatchNorm2d=torch.nn.Module),
    }


@pytest.fixture(scope="module")
def open_clip():
    """Its modules, without its `__init__`; ftfy repairs broken Unicode, which no name of a colour has."""
    folder = package_folder("open_clip", "open_clip_torch")
    parts = {"open_clip": package_of("open_clip", str(folder)), "ftfy": module("ftfy", fix_text=lambda text: text)}
    for name, unused in (("hf_model", "HFTextEncoder"), ("timm_model", "TimmModel")):  # towers of other libraries
        parts[f"open_clip.{name}"] = module(f"open_clip.{name}", **{unused: None})
    parts |= torchvision()
    with importable(parts, library="open_clip"):
        names = ("model", "transform", "tokenizer", "zero_shot_classifier", "constants")
        return SimpleNamespace(**{name: importlib.import_module(f"open_clip.{name}") for name in names})


@pytest.fixture(scope="module")
def theirs(open_clip):
    """A small model of open_clip's class with OpenAI's activation, whose answers depend on the image."""
    import torch

    torch.manual_seed(0)
    vision = dict(layers=LAYERS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIZE)
    text = dict(context_length=77, vocab_size=49408, width=WIDTH, heads=HEADS, layers=LAYERS)
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def converted(state):
    """open_clip's weights under transformers' names (OpenAI's checkpoint was published in both)."""
    ours = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        ours[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        ours[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        ours[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for block in range(LAYERS):
            for old, new in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
                old, new = f"{old}.resblocks.{block}", f"{new}.encoder.layers.{block}"
                parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
                ours |= {f"{new}.self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", parts)}
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    ours[f"{new}.{b}.{kind}"] = state[f"{old}.{a}.{kind}"]
    return ours


@pytest.fixture(scope="module")
def tokenizers(open_clip):
    """(open_clip's, transformers' CLIPTokenizer): of the vocabulary that open_clip's package has."""
    from transformers import CLIPTokenizer

    own = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    with gzip.open(package_folder("open_clip", "open_clip_torch") / "bpe_simple_vocab_16e6.txt.gz", "rt") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    return own, CLIPTokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in lines])


@pytest.fixture(scope="module")
def ours(theirs, tokenizers):
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, hidden_act="quick_gelu")  # fmt: skip
    end = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    config = CLIPConfig(text_config=tower | end, vision_config=dict(tower, image_size=SIZE, patch_size=PATCH), projection_dim=24)  # fmt: skip
    model = CLIPModel(config)
    lacking, unexpected = model.load_state_dict(converted(theirs.state_dict()), strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in lacking)
    return CLIPColors(model, tokenizers[1])


def test_texts_have_open_clips_tokens(tokenizers):
    own, theirs = tokenizers
    texts = [template.format(color=color, name=name) for color in COLORS for name in CLASSES for template in TEMPLATES]
    for text in [*texts, "A photo of  TWO dogs'", "a " * 90]:
        tokens = own(text)[0]
        length = int(tokens.argmax()) + 1  # the end token has the highest id; open_clip pads with 0
        assert theirs(text, truncation=True, max_length=77)["input_ids"] == tokens[:length].tolist()


SIDES = [(32, 32), (64, 48), (48, 64), (35, 32), (32, 35), (33, 37), (71, 20), (20, 71), (1, 9), (301, 7), (500, 333), (111, 113)]  # fmt: skip


@pytest.mark.parametrize("size_px", [SIZE, 224])
def test_pixels_are_open_clips(open_clip, size_px):
    """Bit for bit, whatever the shape: a crop is often odd by one pixel."""
    import torch

    constants = open_clip.constants
    assert (constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD) == (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
    transform = open_clip.transform.image_transform(size_px, is_train=False)
    for width, height in SIDES:
        image = picture(width, height)
        assert torch.equal(torch.from_numpy(clip_pixels(image, size_px)), transform(image)), (width, height)


def test_colours_have_open_clips_cosines(open_clip, theirs, ours, tokenizers):
    """open_clip's zero-shot classifier on GenEval's crops: the object on #999, cut to its box."""
    import torch

    transform = open_clip.transform.image_transform(SIZE, is_train=False)
    answers = set()
    for name in ("dog", "computer keyboard"):
        templates = [lambda color, text=text, name=name: text.format(color=color, name=name) for text in TEMPLATES]
        classifier = open_clip.zero_shot_classifier.build_zero_shot_classifier(theirs, tokenizers[0], COLORS, templates)
        assert torch.allclose(ours._classifier(name), classifier.T.detach(), atol=1e-6)
        for seed in range(12):
            rng = np.random.default_rng(seed)
            image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((90, 70))
            x0, y0 = rng.integers(0, 30, 2)
            box = [x0, y0, x0 + rng.integers(9, 60), y0 + rng.integers(9, 40)]
            mask = np.add.outer(np.arange(70), np.arange(90)) % 40 > 4
            crop = crop_object(image, box, mask)
            with torch.no_grad():
                feature = theirs.encode_image(transform(crop)[None], normalize=True)
                cosines = (feature @ classifier)[0]
            assert torch.allclose(ours._cosines(crop, name), cosines, atol=1e-6)
            assert ours.colors(image, name, [box], [mask]) == [COLORS[int(cosines.argmax())]]
            answers.add(int(cosines.argmax()))
    assert len(answers) > 2
