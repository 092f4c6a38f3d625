"""Qwen's judges: our inputs against those of the library's processor, and answers of small random models."""

import pytest
from tiny_judges import SPECIAL, picture

from eval.judges.qwen_vl import SYSTEM, USER, Qwen3VL, Qwen25VL, Qwen25VLYesNo, model_inputs
from eval.judging.protocols import Request

TEXT = "Is there a dog?. Please answer 'Yes' or 'No' only."


def library_inputs(image, prompt, tokenizer, processor):
    """`Qwen2_5_VLProcessor.__call__`; its constructor alone needs torchvision, for videos."""
    from transformers import Qwen2_5_VLProcessor

    whole = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    whole.image_processor, whole.tokenizer, whole.video_processor = processor, tokenizer, None
    whole.image_token, whole.video_token = "<|image_pad|>", "<|video_pad|>"
    whole.image_token_id, whole.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return whole(text=[prompt], images=[image], padding=True, return_tensors="pt")


@pytest.mark.parametrize("size", [(100, 80), (60, 120), (300, 300)])
def test_inputs_are_those_of_the_librarys_processor(qwen25, size):
    import torch

    _, tokenizer, processor = qwen25
    prompt = (SYSTEM + USER).format(text=TEXT)
    theirs = library_inputs(picture(*size), prompt, tokenizer, processor)
    ours = model_inputs(picture(*size), prompt, tokenizer, processor)
    assert set(theirs) == set(ours)
    for name in ours:
        assert torch.equal(torch.as_tensor(theirs[name]), ours[name]), name


def test_image_tokens_are_marked_and_the_marks_matter(qwen25):
    import torch

    model, tokenizer, processor = qwen25
    inputs = model_inputs(picture(), (SYSTEM + USER).format(text=TEXT), tokenizer, processor)
    assert inputs["mm_token_type_ids"].sum() == inputs["image_grid_thw"].prod() // 4 > 0
    with torch.no_grad():
        marked = model(**inputs).logits
        unmarked = model(**{**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}).logits
    assert (marked - unmarked).abs().max() > 1e-4  # 0 where positions agree


def test_the_prompt_is_the_checkpoints_chat_template():
    """Qwen2.5's template puts a system line first; Qwen3's does not."""
    assert Qwen25VL.template.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user")
    assert Qwen3VL.template.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>")
    assert all(t.endswith("<|im_end|>\n<|im_start|>assistant\n") for t in (Qwen25VL.template, Qwen3VL.template))


def test_a_small_random_qwen25_answers_the_same_whatever_else_is_asked(qwen25):
    judge = Qwen25VL.of(*qwen25, "sha256:tiny")
    requests = [
        Request([picture(seed=i)], TEXT, {"max_new_tokens": 4} if i else {"max_new_tokens": 9}) for i in range(2)
    ]
    together = judge.answer(requests)
    assert together == [judge.answer([request])[0] for request in requests] == judge.answer(requests)
    assert all(isinstance(text, str) and not any(token in text for token in SPECIAL) for text in together)


def test_sampling_leaves_the_callers_random_numbers_alone(qwen25):
    import torch

    judge = Qwen25VL.of(*qwen25, "sha256:tiny")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    judge.answer([Request([picture()], TEXT, {"max_new_tokens": 2})])
    assert torch.equal(torch.rand(1), expected)


def test_the_number_of_tokens_is_the_questions(qwen25, monkeypatch):
    judge = Qwen25VL.of(*qwen25, "sha256:tiny")
    asked = []

    def generate(max_new_tokens, input_ids, **_):
        asked.append(max_new_tokens)
        return input_ids

    monkeypatch.setattr(judge._model, "generate", generate)
    judge.answer([Request([picture()], TEXT), Request([picture()], TEXT, {"max_new_tokens": 256})])
    assert asked == [128, 256]


@pytest.mark.parametrize(("said", "answer"), [("Yes", "yes"), ("No.", "no"), (" Yes.\n", "yes"), ("Maybe", "maybe")])
def test_dpgs_questions_are_answered_in_its_rules_words(qwen25, monkeypatch, said, answer):
    judge, asked = Qwen25VLYesNo.of(*qwen25, "sha256:tiny"), []
    monkeypatch.setattr(Qwen25VL, "answer_one", lambda self, request: asked.append(request.text) or said)
    assert judge.answer([Request([picture()], "Is there a dog?")]) == [answer]
    assert asked == ["Is there a dog? Please answer 'Yes' or 'No' only."]


def test_soft_tifa_adds_the_probabilities_of_the_first_tokens(qwen3):
    import torch

    model, tokenizer, processor = qwen3
    judge = Qwen3VL.of(*qwen3, "sha256:tiny")
    question = "How many dogs are there? Answer in one word."
    answers = ["two", "Two", " two", " Two", "2", " 2"]
    with torch.no_grad():
        logits = model(**model_inputs(picture(), USER.format(text=question), tokenizer, processor)).logits[0, -1]
    p = logits.softmax(-1)
    ids = {c: tokenizer.convert_tokens_to_ids(c) for c in ("t", "T", "Ġ", "2")}
    expected = p[ids["t"]] + p[ids["T"]] + 3 * p[ids["Ġ"]] + p[ids["2"]]  # repetitions count, as in the official code
    (answer,) = judge.answer([Request([picture()], question, {"answers": answers})])
    assert answer == pytest.approx(float(expected), abs=1e-6)


def test_the_spec_names_what_moves_an_answer(qwen25):
    spec = Qwen25VL.of(*qwen25, "sha256:tiny").spec
    assert spec["weights"] == "sha256:tiny" and spec["dtype"] == "float32" and spec["attention"] == "sdpa"
    assert {"class", "processor", "decoding", "template", "libraries"} <= set(spec)
