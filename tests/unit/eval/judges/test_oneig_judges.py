"""OneIG's judges of reasoning and style: a Llama in both directions, CSD from OpenAI's names."""

import numpy as np
import pytest
from tiny_judges import picture

from eval import oneig
from eval.judges import registry, style
from eval.judges.base import clip_pixels
from eval.judges.llm2clip import END, HEADER, LLM2CLIP, bidirectional, embed_texts
from eval.judges.style import OneIGStyle, convert_csd, load_tower
from eval.judging.protocols import Request


@pytest.fixture(scope="module")
def llama(bytes_tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(bytes_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return bidirectional(LlamaModel(config).eval())


def test_a_padded_text_has_the_embedding_of_the_unpadded_one(llama, bytes_tokenizer):
    """With padding, a Llama is causal again."""
    import torch

    texts = ["two", "a much longer text about a red house"]
    together = embed_texts(llama, bytes_tokenizer, texts)
    apart = torch.cat([embed_texts(llama, bytes_tokenizer, [text]) for text in texts])
    assert torch.allclose(together, apart, atol=1e-5)


def test_every_token_sees_the_last_one_with_and_without_padding(llama):
    import torch

    ids = torch.tensor([[1, 5, 9, 7]])
    changed = torch.tensor([[1, 5, 9, 8]])
    for mask in (torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]])):
        with torch.no_grad():
            a, b = (llama(x, attention_mask=mask).last_hidden_state for x in (ids, changed))
        assert (a[0, 1] - b[0, 1]).abs().max() > 1e-5


def test_the_mean_leaves_the_header_out(llama, bytes_tokenizer):
    import torch

    ids = bytes_tokenizer(HEADER + "cat" + END, return_tensors="pt")["input_ids"]
    count = len(bytes_tokenizer("cat" + END)["input_ids"])
    with torch.no_grad():
        expected = llama(ids).last_hidden_state[0, -count:].mean(0)
    assert torch.allclose(embed_texts(llama, bytes_tokenizer, ["cat"])[0], expected, atol=1e-6)


def test_a_small_llm2clip_answers_a_cosine(llama, bytes_tokenizer, clip):
    import torch

    class Towers(torch.nn.Module):
        """LLM2CLIP's interface; its class is code of its repository, which is not installed."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.adapter = torch.nn.Linear(32, 24)

        def get_image_features(self, pixels):
            return clip[0].get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, embeddings):
            return self.adapter(embeddings)

    judge = LLM2CLIP.of(Towers(), llama, bytes_tokenizer, clip[2], {"clip": "tiny"})
    same, other, again = judge.answer([Request([picture()], text) for text in ("a cat", "a dog", "a cat")])
    assert -1 <= same <= 1 and same == again != other


def test_remote_code_runs_at_a_named_commit_alone():
    for name in ("llm2clip", "llm2clip@main"):
        with pytest.raises(ValueError, match="review a commit and name it, as llm2clip@COMMIT"):
            registry.load(name)


WIDTH, HEADS, LAYERS, PATCH, SIZE = 32, 4, 2, 8, 32


def openai_tower():
    """CLIP's vision transformer as OpenAI's and CSD's code writes it, with the style matrix."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS)
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False)[0]
            y = self.mlp["c_fc"](self.ln_2(x))
            return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.class_embedding = nn.Parameter(torch.randn(WIDTH))
            self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
            self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
            self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(LAYERS))})

        def forward(self, pixels):
            x = self.conv1(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
            x = self.ln_pre(x).transpose(0, 1)
            for block in self.transformer["resblocks"]:
                x = block(x)
            return self.ln_post(x[0])

    class CSD(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()
            self.last_layer_style = nn.Parameter(torch.randn(WIDTH, 16))

        def forward(self, pixels):
            return nn.functional.normalize(self.backbone(pixels) @ self.last_layer_style, dim=1)

    torch.manual_seed(0)
    model = CSD()
    for parameter in model.parameters():  # biases and norms too: with their defaults, swapped ones would not be noticed
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def judge():
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIZE, patch_size=PATCH)  # fmt: skip
    state = convert_csd({f"module.{name}": tensor for name, tensor in openai_tower().state_dict().items()})
    head = state.pop("last_layer_style")
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes))
    load_tower(tower, state)
    torch.manual_seed(1)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=20)).to(torch.bfloat16)
    references = {
        f"{kind}/{name}": torch.nn.functional.normalize(torch.randn(3, width), dim=-1).to(dtype)
        for name in ("baroque", "lego")
        for kind, width, dtype in (("csd", 16, torch.float32), ("se", 20, torch.bfloat16))
    }
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return OneIGStyle.of(tower, head, encoder, processor, references, {"csd": "tiny"})


def test_csds_weights_give_the_same_embedding_in_the_librarys_class(judge):
    import torch

    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = openai_tower()(pixels)
        ours = torch.nn.functional.normalize(judge._tower(pixel_values=pixels).pooler_output @ judge._head, dim=1)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_small_style_judge_scores_against_the_references_of_the_style(judge):
    import torch

    image = picture(80, 60)
    (score,) = judge.answer([Request([image], "", {"style": "lego"})])
    with torch.no_grad():
        csd = openai_tower()(torch.from_numpy(clip_pixels(image, SIZE))[None])
        inputs = judge._processor(images=image, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
        se = torch.nn.functional.normalize(judge._encoder(inputs).image_embeds, dim=-1)
    best_csd = max(float((csd @ judge._references["csd/lego"].T).max()), 0)
    best_se = max(float((se @ judge._references["se/lego"].T).max()), 0)  # bfloat16, as the official code multiplies
    assert score == pytest.approx((best_csd + best_se) / 2, abs=1e-4)
    assert oneig.style_score([], [], [], []) is None


def test_an_unknown_style_and_an_absent_directory_are_clear_errors(judge, tmp_path):
    with pytest.raises(ValueError, match="no references of style 'rococo'; there are baroque, lego"):
        judge.answer([Request([picture()], "", {"style": "rococo"})])
    with pytest.raises(ValueError, match=r"needs a directory with csd\.safetensors and references\.safetensors"):
        registry.load(f"oneig-style@{tmp_path}")


def test_the_published_pickles_are_converted_once_and_code_in_them_does_not_run(tmp_path, capsys):
    import argparse
    import pickle

    import torch
    from safetensors.torch import load_file

    checkpoint = {"model_state_dict": openai_tower().state_dict(), "args": argparse.Namespace(lr=1e-3)}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    for name in ("csd", "se"):
        torch.save({"lego": torch.ones(3, 4)}, tmp_path / f"{name}.pt")
    files = [str(tmp_path / name) for name in ("checkpoint.pth", "csd.pt", "se.pt", "out")]
    assert style.main(files) == 0
    assert set(load_file(tmp_path / "out" / "references.safetensors")) == {"csd/lego", "se/lego"}
    assert "last_layer_style" in load_file(tmp_path / "out" / "csd.safetensors")

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "se.pt").write_bytes(pickle.dumps(Runs()))
    assert style.main(files) == 1
    assert not (tmp_path / "ran").exists() and "error:" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no tensor 'conv1\.weight'"):
        convert_csd({"class_embedding": torch.zeros(1)})


def test_tall_and_wide_images_keep_their_middle():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    from PIL import Image

    for array in (wide, wide.transpose(1, 0, 2)):
        middle = clip_pixels(Image.fromarray(array), 40)
        assert middle.shape == (3, 40, 40) and middle.min() > 1.5
