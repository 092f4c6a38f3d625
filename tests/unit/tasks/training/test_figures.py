"""The figures on the page of a training stage."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from model.config import TransformerConfig
from model.transformer import NucleusTransformer, RouterTrace
from tasks.training.plots import ALLOCATION, allocation_by_layer, training_html

ALT = 'alt="expert allocation by layer"'


def statistics(dense: bool) -> dict[str, float]:
    """The routers' statistics of a forward, as the trainer logs them."""
    model = NucleusTransformer(TransformerConfig(
        in_channels=16, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), num_experts=4, moe_intermediate_dim=8, mlp_ratio=6.0,
        capacity_factors=2.0, dense_moe_strategy="all_dense" if dense else "leave_first_block_dense",
    ))  # fmt: skip
    trace = RouterTrace()
    model(torch.randn(2, 16, 16), (1, 4, 4), torch.randn(2, 3, 8), timestep=torch.rand(2), collect=trace)
    return {f"expert/{name}": value for name, value in trace.statistics().items()}


@pytest.fixture
def checkpoints(tmp_path):
    """Writes a run that was killed after step 30 and resumed from step 10; returns its directory and its log."""

    def write(dense: bool = False):
        logged = {}
        for steps, purge in (((1, 10, 20, 30), None), ((20, 30, 40), 11)):
            writer = SummaryWriter(str(tmp_path / "tensorboard"), purge_step=purge)
            for step in steps:
                logged[step] = statistics(dense)
                for name, value in logged[step].items():
                    writer.add_scalar(name, value, step)
            writer.close()
        lines = [{"step": step, "loss": 1.0, **values} for step, values in logged.items()]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path, logged

    return write


@pytest.mark.slow
def test_every_layers_allocation_over_the_run_is_a_map_on_the_page(checkpoints):
    directory, logged = checkpoints()
    actual = allocation_by_layer(directory / "tensorboard")
    for name, _ in ALLOCATION:
        assert list(actual[name]) == [1, 2, 3]
        for layer, by_step in actual[name].items():
            assert list(by_step) == [1, 10, 20, 30, 40]
            expected = [logged[step][f"expert/layer{layer:02d}/{name}"] for step in by_step]
            assert list(by_step.values()) == pytest.approx(expected, rel=1e-6)
    page = training_html(directory)
    picture = re.search(ALT + r' src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture[1]))).width > 1000


def test_a_model_without_experts_has_no_map(checkpoints):
    assert ALT not in training_html(checkpoints(dense=True)[0])
