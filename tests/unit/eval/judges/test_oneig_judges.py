"""OneIG's judges of reasoning and style: a Llama in both directions, CSD from OpenAI's names."""

import numpy as np
import pytest
from tiny_judges import SIZE, make_llama, make_llm2clip, make_style, openai_tower, picture

from eval import oneig
from eval.judges import registry, style
from eval.judges.base import clip_pixels
from eval.judges.llm2clip import END, HEADER, bidirectional, embed_texts
from eval.judges.style import convert_csd
from eval.judging.protocols import Request


@pytest.fixture(scope="module")
def llama(bytes_tokenizer):
    return bidirectional(make_llama(bytes_tokenizer))


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
    judge = make_llm2clip(llama, bytes_tokenizer, clip)
    same, other, again = judge.answer([Request([picture()], text) for text in ("a cat", "a dog", "a cat")])
    assert -1 <= same <= 1 and same == again != other


def test_remote_code_runs_at_a_named_commit_alone():
    for name in ("llm2clip", "llm2clip@main"):
        with pytest.raises(ValueError, match="review a commit and name it, as llm2clip@COMMIT"):
            registry.load(name)


@pytest.fixture(scope="module")
def judge():
    return make_style()


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
