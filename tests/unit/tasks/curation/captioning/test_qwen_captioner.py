"""Qwen3-VL through transformers: a small random instance of the class, in batches."""

from __future__ import annotations

import pytest
from tiny_judges import SPECIAL, picture

from tasks.curation.captioning import check_captioner
from tasks.curation.captioning.base import Request
from tasks.curation.captioning.qwen_vl import QwenVL
from tasks.curation.config import CaptionerConfig

COMMIT = "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b"


def config(**changes) -> CaptionerConfig:
    fields = {"name": "qwen3-vl", "model": "Qwen/Qwen3-VL-8B-Instruct", "revision": COMMIT, "temperature": 0.0}
    return CaptionerConfig(**(fields | changes))


@pytest.fixture(scope="module")
def parts():
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL),
    )
    ids = dict(zip(SPECIAL, fast.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=dict(vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=rope, max_position_embeddings=1024, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"]),
            vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0]),
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )
    ).eval()  # fmt: skip
    return model, fast, Qwen2VLImageProcessorPil(min_pixels=64 * 64, max_pixels=128 * 128, patch_size=16, merge_size=2)


def asked(number: int, tokens: int = 6, prompt: str = "Describe this image.") -> Request:
    return Request(f"{number:064x}", "short", 1, picture(96 + 32 * number, 80, seed=number), prompt, tokens, number)


def texts(parts, requests, **changes) -> dict[int, tuple[str, str]]:
    captioner = QwenVL(config(**changes), parts)
    return {request.seed: tuple(answer) for request, answer in captioner.answers(requests)}


@pytest.mark.slow
def test_each_image_of_a_batch_gets_the_answer_that_it_gets_by_itself(parts):
    requests = [asked(0), asked(1, prompt="What is in this picture? Say it in a few words."), asked(2)]
    together = texts(parts, requests, batch_size=4)
    assert len(together) == 3
    assert together == texts(parts, requests, batch_size=1)


def test_every_request_is_answered_whatever_its_limit_of_tokens(parts):
    requests = [asked(i, tokens=3 + i % 2 * 4) for i in range(5)]
    result = texts(parts, requests, batch_size=2)
    assert result.keys() == set(range(5))
    assert all(reason in ("stop", "length") for _, reason in result.values())


def test_an_answer_without_an_end_is_cut_off(parts, monkeypatch):
    model = parts[0]
    real = model.generate

    def generate(**inputs):
        import torch

        out = real(**inputs)
        begin = inputs["input_ids"].shape[1]
        out[0, begin:], out[1, begin + 2] = 5, model.generation_config.eos_token_id
        return torch.as_tensor(out)

    monkeypatch.setattr(model, "generate", generate)
    result = texts(parts, [asked(0), asked(1)], batch_size=2)
    assert sorted(reason for _, reason in result.values()) == ["length", "stop"]
    assert not any(token in text for text, _ in result.values() for token in SPECIAL)


def test_sampling_follows_the_seed_and_keeps_the_callers_random_state(parts):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    actual = texts(parts, [asked(0)], temperature=1.0)
    assert torch.equal(torch.rand(1), expected)
    assert actual == texts(parts, [asked(0)], temperature=1.0)


def test_weights_of_the_hub_are_pinned_to_a_commit():
    check_captioner(config())
    check_captioner(config(model="./weights", revision=""))
    with pytest.raises(ValueError, match="must be a commit of Qwen/Qwen3-VL-8B-Instruct"):
        check_captioner(config(revision="main"))
    with pytest.raises(ValueError, match="must be ORG/NAME on the Hub"):
        check_captioner(config(model="weights"))
