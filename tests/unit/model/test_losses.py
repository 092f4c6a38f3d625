import pytest
import pywt
import torch
from small_model import SMALL

from model import losses
from model.config import TransformerConfig
from model.transformer import NucleusTransformer, RouterTrace

CONFIG = TransformerConfig(**SMALL)


def test_flow_matching_loss_is_the_mse_and_its_per_sample_means():
    prediction, target = torch.randn(2, 5, 7, 3, dtype=torch.bfloat16).unbind(0)
    loss, per_sample = losses.flow_matching_loss(prediction, target)
    assert loss.dtype == torch.float32 and per_sample.shape == (5,)
    expected = torch.nn.functional.mse_loss(prediction.double(), target.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert per_sample[2].item() == pytest.approx(
        torch.nn.functional.mse_loss(prediction[2].double(), target[2].double()).item(), rel=1e-5
    )
    assert per_sample.mean().item() == pytest.approx(loss.item())


def test_z_loss_equals_its_definition_and_trains_only_routers():
    model = NucleusTransformer(CONFIG)
    trace = RouterTrace()
    model(
        hidden_states=torch.randn(2, 16, 16),
        img_shapes=(1, 4, 4),
        encoder_hidden_states=torch.randn(2, 3, 24),
        timestep=torch.rand(2),
        collect=trace,
    )
    loss = losses.router_z_loss(trace.logits())
    expected = sum((torch.log(torch.exp(logits).sum(-1)) ** 2).mean() for logits in trace.logits())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.transformer_blocks[1].img_mlp.gate.weight.grad.any()
    assert losses.router_z_loss([]).item() == 0.0


def test_orthogonality_update_is_the_penaltys_gradient_step():
    torch.manual_seed(0)
    model = NucleusTransformer(CONFIG)
    weight = model.transformer_blocks[2].img_mlp.gate.weight
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight) + 0.5)
    before = weight.detach().clone().requires_grad_()
    penalty = 0.0
    for i in range(4):
        for j in range(i):
            penalty = penalty + torch.cosine_similarity(before[i], before[j], dim=0) ** 2
    (gradient,) = torch.autograd.grad(penalty, before)
    assert losses.router_orthogonality(before).item() == pytest.approx(penalty.item(), rel=1e-5)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "gate" not in n}
    losses.apply_router_orthogonality(model, 0.1)
    assert torch.allclose(weight, before - 0.1 * gradient, atol=1e-6)
    assert all(torch.equal(others[n], p) for n, p in model.named_parameters() if n in others)
    for _ in range(400):
        losses.apply_router_orthogonality(model, 5.0)
    assert losses.router_orthogonality(weight).item() < 1e-3 * penalty.item()


def test_haar_bands_equal_pywavelets():
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), "haar", axes=(-2, -1))
    result = losses.haar_bands(x)
    assert result.shape == (2, 3, 4, 3, 4)
    for i, band in enumerate((low, horizontal, vertical, diagonal)):
        assert torch.allclose(result[:, :, i], torch.from_numpy(band)), i
    assert result.square().sum().item() == pytest.approx(x.square().sum().item())  # orthonormal
    with pytest.raises(ValueError, match="5 x 8"):
        losses.haar_bands(torch.zeros(1, 1, 5, 8))


def test_wavelet_loss_is_the_mse_of_the_bands_in_fp32():
    a, b = torch.randn(2, 2, 16, 4, 6).bfloat16().unbind(0)
    bands = [pywt.dwt2(x.float().numpy(), "haar", axes=(-2, -1)) for x in (a, b)]
    difference = [torch.from_numpy(p - q) for p, q in zip(*([low, *details] for low, details in bands))]
    expected = sum(d.square().mean() for d in difference) / 4
    loss = losses.wavelet_loss(a, b)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_trained_in_guidance_settles_at_the_guided_prediction():
    """A model that follows its target ends at c + 2 (c - u) + 0.5 (c - q), where c is its prediction without guidance."""
    generator = torch.Generator().manual_seed(0)
    c, u, q = torch.randn(3, 3, 4, 5, generator=generator)
    for away_from, expected in (
        ([(u, 3.0)], u + 3.0 * (c - u)),
        ([(q, 1.5)], q + 1.5 * (c - q)),
        ([(u, 3.0), (q, 1.5)], c + 2.0 * (c - u) + 0.5 * (c - q)),
    ):
        v = c.clone().requires_grad_()
        for _ in range(200):
            v = c + losses.guidance(v, away_from)
        assert torch.allclose(v, expected, atol=1e-4) and not v.requires_grad
