"""The inputs of compiled blocks before a stage's first step, or before the step that it resumes from."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchtitan", reason="training needs torchtitan")

from model.train.trainer import NucleusTrainer


def test_blocks_compile_on_one_micro_batch_of_each_bucket_in_order_and_nothing_of_it_stays():
    seen = []
    trainer = SimpleNamespace(
        settings=SimpleNamespace(deterministic=True),
        parallel_dims=SimpleNamespace(ep_enabled=True),
        config=SimpleNamespace(
            stage=SimpleNamespace(guidance_at=lambda step: f"of step {step}"), training=SimpleNamespace(steps=20)
        ),
        dataloader=SimpleNamespace(
            order=SimpleNamespace(first_steps=lambda: [0, 3, 7]),
            micro_batches=lambda step: iter([f"first of step {step}", f"second of step {step}"]),
        ),
        optimizers=SimpleNamespace(zero_grad=lambda: seen.append("no gradients")),
        routing="of the last batch",
        bin_sums=torch.ones(5),
        bin_counts=torch.ones(5),
    )

    def forward_backward_step(*, batch, guidance, **_):
        assert torch._inductor.config.deterministic and not torch._inductor.config.reorder_for_peak_memory
        assert torch._dynamo.config.fail_on_recompile_limit_hit
        seen.append((batch, guidance))

    trainer.forward_backward_step = forward_backward_step
    with NucleusTrainer._compiled(trainer):
        assert seen == [step for n in (0, 3, 7) for step in ((f"first of step {n}", "of step 20"), "no gradients")]
        assert trainer.routing is None and not trainer.bin_sums.any() and not trainer.bin_counts.any()
    assert not torch._inductor.config.deterministic
