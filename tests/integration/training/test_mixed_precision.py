"""bfloat16 training: what is rounded and what is not, and that checkpointing leaves checkpoints' names alone."""

import json

import pytest
import torch
from train_helpers import read_weights, train_config, training_stage, write_latents

STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(metrics, weights, types seen) of the same short stage in fp32, and in bf16 with selective checkpointing."""
    from model import losses
    from model.layers import moe
    from model.train.run import train_stage

    folder = tmp_path_factory.mktemp("runs")
    latents = write_latents(folder / "latents")
    actual = {}
    for dtype, policy in (("float32", "none"), ("bfloat16", "selective")):
        seen: dict[str, set[torch.dtype]] = {}

        def spy(owner, name, see):
            plain = getattr(owner, name)

            def spied(*args):
                result = plain(*args)
                for label, tensor in see(args, result).items():
                    seen.setdefault(label, set()).add(tensor.dtype)
                return result

            patch.setattr(owner, name, spied)

        with pytest.MonkeyPatch.context() as patch:
            spy(
                moe.MoE, "route", lambda args, r: {"logits": r.logits_BSE, "scores": r.scores_BSE, "gates": r.gates_BEC}
            )
            spy(moe.Experts, "forward", lambda args, out: {"experts": out})
            spy(losses, "flow_matching_loss", lambda args, out: {"prediction": args[0], "loss": out[0]})
            spy(losses, "wavelet_loss", lambda args, out: {"wavelet": out, "latents": args[0]})
            spy(losses, "router_z_loss", lambda args, out: {"z_loss": out})
            out = folder / dtype
            out.mkdir()
            config = train_config(
                steps=STEPS, dtype=dtype, activation_checkpointing=policy, log_every_steps=1, checkpoint_every_steps=2
            )
            train_stage(latents, training_stage(config), None, folder / f"work_{dtype}", out)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        actual[dtype] = metrics, read_weights(out), seen
    return actual


def test_products_are_in_bfloat16_and_router_and_losses_in_fp32(runs):
    _, _, seen = runs["bfloat16"]
    assert seen.pop("experts") == {torch.bfloat16}
    assert set(seen) == {"logits", "scores", "gates", "prediction", "loss", "wavelet", "latents", "z_loss"}
    assert all(types == {torch.float32} for types in seen.values()), seen


def test_bfloat16_steps_are_close_to_fp32_ones(runs):
    exact, rounded = ([line["loss"] for line in runs[dtype][0]] for dtype in ("float32", "bfloat16"))
    assert len(exact) == STEPS
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


def test_weights_stay_fp32_under_their_own_names(runs):
    exact, rounded = (runs[dtype][1][STEPS] for dtype in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
