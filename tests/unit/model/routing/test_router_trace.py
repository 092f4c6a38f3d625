"""The router's statistics: their numbers, and their cost on a device."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from model.layers.moe import Routing
from model.transformer import RouterTrace

LAYERS, B, S, E, C = (3, 5, 11), 2, 6, 4, 2
WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"}


@pytest.fixture
def trace():
    """Three layers, recorded out of order."""
    made = RouterTrace()
    for layer in reversed(LAYERS):
        logits = torch.randn(B, S, E) * layer
        scores = logits.softmax(-1)
        gates, indices = scores.mT.topk(C, dim=-1)
        made.add(layer, Routing(logits, scores, indices, gates))
    return made


def test_each_layers_numbers_are_those_counted_by_hand(trace):
    result = trace.statistics()
    for layer in LAYERS:
        routing = trace.layers[layer]
        taken = [[0] * S for _ in range(B)]
        for b in range(B):
            for place in routing.indices_BEC[b].flatten().tolist():
                taken[b][place] += 1
        counts = [count for sample in taken for count in sample]
        assert result[f"layer{layer:02d}/dropped"] == pytest.approx(counts.count(0) / len(counts))
        assert result[f"layer{layer:02d}/experts_max"] == max(counts)
        entropy = torch.distributions.Categorical(logits=routing.logits_BSE).entropy().mean().item() / math.log(E)
        assert result[f"layer{layer:02d}/entropy"] == pytest.approx(entropy)
        assert result[f"layer{layer:02d}/logit_max"] == max(map(abs, routing.logits_BSE.flatten().tolist()))
    for name in ("dropped", "experts_max", "entropy", "logit_max"):
        assert result[name] == sum(result[f"layer{layer:02d}/{name}"] for layer in LAYERS) / len(LAYERS)
    assert list(result) == [name for prefix in ("", "layer03/", "layer05/", "layer11/") for name in
                           (f"{prefix}dropped", f"{prefix}experts_max", f"{prefix}entropy", f"{prefix}logit_max")]  # fmt: skip
    assert RouterTrace().statistics() == {}


def test_the_host_waits_for_the_device_once_however_many_layers_there_are(trace):
    waits = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in WAITS:
                waits.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        trace.statistics()
    assert len(waits) == 1, waits
