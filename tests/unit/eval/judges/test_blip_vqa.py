"""BLIP as DPG-Bench's judge, as a small random instance."""

import pytest
from tiny_judges import make_blip, picture

from eval.judges.blip_vqa import BlipVQA
from eval.judging.protocols import Request


@pytest.fixture(scope="module")
def parts(bytes_tokenizer):
    return make_blip(bytes_tokenizer)


def test_a_small_random_judge_answers_greedily_by_the_models_definition(parts):
    """The decoder, run token by token on the question's states, which attend to the image."""
    import torch

    model, tokenizer, processor = parts
    judge = BlipVQA.of(*parts, "sha256:tiny")
    (answer,) = judge.answer([Request([picture()], "Is there a DOG?")])
    with torch.no_grad():
        pixels = processor(images=[picture()], return_tensors="pt")["pixel_values"]
        image = model.vision_model(pixel_values=pixels).last_hidden_state
        ids = tokenizer(["is there a dog?"], return_tensors="pt")["input_ids"]
        question = model.text_encoder(input_ids=ids, encoder_hidden_states=image).last_hidden_state
        said = torch.tensor([[1]])
        for _ in range(10):
            logits = model.text_decoder(input_ids=said, encoder_hidden_states=question).logits
            said = torch.cat([said, logits[:, -1:].argmax(-1)], dim=1)
            if said[0, -1] == 2:
                break
    assert answer == tokenizer.decode(said[0], skip_special_tokens=True).strip()


def test_an_answer_depends_on_its_image_and_question_alone(parts):
    judge = BlipVQA.of(*parts, "sha256:tiny")
    requests = [Request([picture(seed=i)], text) for i, text in enumerate(("a?", "is there a long question?"))]
    assert judge.answer(requests) == [judge.answer([request])[0] for request in requests]
