"""The trainer's gradient against the objective, written from its formulas."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from train_helpers import train_config, training_stage, transformer_config, write_latents

from model.config import GuidanceConfig

pytestmark = pytest.mark.slow
WEIGHTS = {"router_z_loss": 0.3, "load_balance": 0.7, "wavelet": 0.5}


def objective(seen, clean, noise, wavelet, guidance=0.0):
    """The objective for the model's inputs and output; latents [B, C, h, w]. `guidance` is added to the target
    velocity."""
    t = seen["timestep"].view(-1, 1, 1, 1)
    noisy = (1 - t) * clean + t * noise
    tokens = F.pixel_unshuffle(noisy, 2).flatten(2).mT  # a token's channels: channel, row, column
    assert torch.allclose(seen["hidden_states"], tokens, atol=1e-6)
    rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    velocity = F.pixel_shuffle(seen["output"].mT.unflatten(-1, (rows, columns)), 2)
    error = velocity - (clean - noise + guidance)
    total = (error**2).mean()
    for logits in seen["logits"]:
        total = total + WEIGHTS["router_z_loss"] * (logits.exp().sum(-1).log() ** 2).mean()
        scores = logits.softmax(-1)
        chosen = F.one_hot(scores.topk(2).indices, scores.shape[-1]).sum(-2) / 2
        balance = scores.shape[-1] * (chosen.double().mean(1) * scores.mean(1)).sum(-1).mean()
        total = total + WEIGHTS["load_balance"] * balance
    if wavelet:
        # The clean latent that the velocity implies is off by t error. Haar bands together keep its square (Parseval).
        assert torch.allclose(noisy + t * (clean - noise), clean, atol=1e-5)
        total = total + WEIGHTS["wavelet"] * ((t * error) ** 2).mean()
    return total


@pytest.fixture
def trainer_of(tmp_path):
    """Builds a trainer in a session that lasts as long as the test."""
    from model.train.config import trainer_config
    from model.train.device import training_session

    built = []

    def build(train, model, **changes):
        built.append(
            trainer_config(
                training_stage(train, model, **changes),
                latents_dir=write_latents(tmp_path / "latents"),
                work_dir=tmp_path / "work",
                init_from=None,
                ranks=1,
            ).build()
        )
        return built[0]

    with training_session():
        yield build
        built[0].close()


@pytest.mark.parametrize("wavelet", [False, True])
def test_the_trainers_gradient_is_the_objectives(trainer_of, wavelet):
    train = train_config(stage={"wavelet": wavelet}, losses=WEIGHTS)
    trainer = trainer_of(train, transformer_config(routing={"kind": "token_choice"}))
    model, seen = trainer.model, {"logits": []}
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)  # it starts at 0, and then hides everything before it
    model.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: seen.update(output=output))
    for block in model.transformer_blocks:
        if block.moe_enabled:
            block.img_mlp.gate.register_forward_hook(lambda _, args, output: seen["logits"].append(output))
    batch = next(trainer.batch_generator(trainer.dataloader))
    trainer.optimizers.zero_grad()
    trainer.forward_backward_step(batch=batch)
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    seen["logits"].clear()
    model.zero_grad()
    again = {key: value for key, value in seen.items() if key not in ("logits", "output", "collect")}
    model(**again)
    objective(seen, batch.latents, batch.noise, wavelet).backward()
    assert result.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max() + 1e-8
            assert (result[name] - parameter.grad).abs().max() < 2e-4 * scale, name


@pytest.mark.parametrize(("scale", "autoguidance"), [(1.0, 1.0), (4.0, 1.0), (1.0, 1.5), (3.0, 1.5)])
def test_guided_steps_aim_where_guidance_would_point_but_for_dropped_captions(trainer_of, scale, autoguidance):
    """At c + (a (v - u) + b (v - q)) / (1 + a + b) for scales 1 + a and 1 + b: v for the caption, u for the empty prompt,
    q of the weaker model, all without gradient."""
    a, b = scale - 1, autoguidance - 1
    guidance = GuidanceConfig(steps=3, scale=scale, autoguidance=autoguidance) if a + b else None
    train = train_config(steps=10, stage={"wavelet": True}, losses={"wavelet": 0.5}, caption_dropout=0.4)
    stage = train.stages[0].model_copy(update={"guidance": guidance})
    trainer = trainer_of(train, transformer_config(), stage=stage)
    model, calls = trainer.model, []
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    batch = next(trainer.dataloader.micro_batches(0))
    dropped = torch.from_numpy(batch.plan.captions == -1)
    assert dropped.any() and not dropped.all()
    weaker = trainer.weaker_model = copy.deepcopy(model)
    with torch.no_grad():
        weaker.proj_out.weight *= 0.5
    for each in (model, weaker):
        each.register_forward_hook(
            lambda module, args, inputs, output: calls.append({**inputs, "output": output, "model": module}),
            with_kwargs=True,
        )
    trainer.optimizers.zero_grad()
    assert [trainer.config.stage.guidance_at(step) for step in (7, 8, 10)] == [None, guidance, guidance]
    trainer.forward_backward_step(batch=batch, guidance=trainer.config.stage.guidance_at(8))
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with_text, *others = calls
    assert [call["model"] for call in others] == [model] * (a > 0) + [weaker] * (b > 0)
    model.zero_grad()
    inputs = {key: value for key, value in with_text.items() if key not in ("output", "collect", "model")}
    v = model(**inputs)
    aim = torch.zeros_like(v)
    for call in others:
        empty, mask = trainer.dataloader.dataset.text([0], batch.plan.text_tokens)
        text = (
            (empty.expand(len(v), -1, -1), mask.expand(len(v), -1))
            if call["model"] is model
            else (batch.text, batch.mask)
        )
        assert torch.equal(call["encoder_hidden_states"], text[0].float())
        assert torch.equal(call["encoder_hidden_states_mask"], text[1])
        aim += (a if call["model"] is model else b) * (v - call["output"]).detach() / (1 + a + b)
    aim[dropped] = 0
    assert (aim.abs().max() > 1e-3) == (a + b > 0)
    rows, columns = (side // 2 for side in batch.latents.shape[-2:])
    guidance = F.pixel_shuffle(aim.mT.unflatten(-1, (rows, columns)), 2)
    objective({**inputs, "output": v, "logits": []}, batch.latents, batch.noise, True, guidance).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale_of = parameter.grad.abs().max() + 1e-8
            assert (result[name] - parameter.grad).abs().max() < 2e-4 * scale_of, name


def test_a_batch_reaches_the_device_without_a_wait_and_its_text_is_widened_there(trainer_of):
    trainer = trainer_of(train_config(), transformer_config())
    batch = next(trainer.dataloader.micro_batches(0))
    copies, seen = [], {}
    trainer.model.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") in ("to", "cuda") and torch.device in map(type, (*args, *kwargs.values())):
                copies.append(kwargs.get("non_blocking", False))
            return func(*args, **kwargs)

    with Watch():
        trainer.forward_backward_step(batch=replace(batch, text=batch.text.half()), keep_routing=True)
    assert copies == [True] * 5  # latents, noise, timesteps, text, mask
    assert torch.equal(seen["encoder_hidden_states"], batch.text.half().float())
