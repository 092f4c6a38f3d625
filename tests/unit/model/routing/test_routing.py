"""The routing analysis on routers with known answers."""

import json

import pytest
import torch
from object_store import s3_bucket
from safetensors.torch import load_file

from model import flow, storage
from model.config import TransformerConfig
from model.data.latents import LatentWriter
from model.layers.moe import Experts
from model.routing_report import (
    describe_layer,
    expert_output_cosine,
    find_transformer,
    gate_cosine,
    jaccard,
    main,
    mean_pair_cosine,
    token_maps,
    watch_routing,
)
from model.transformer import NucleusTransformer
from model.weights.export import export_transformer

LEVELS = [0.9, 0.6, 0.3, 0.1]


def model_of(layers=1, **changes):
    torch.manual_seed(0)
    config = TransformerConfig(
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=4,
        moe_intermediate_dim=8,
        capacity_factors=2.0,
        **changes,
    )
    return NucleusTransformer(config).eval()


def watch(model, same_noise=True):
    """The routers' choices; with `same_noise` the noise is the image, so that tokens are the same at each timestep."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 4, 8, 4, generator=generator)
    noise = clean if same_noise else torch.randn(clean.shape, generator=generator)
    return watch_routing(model, clean, noise, torch.randn(3, 5, 24, generator=generator), None, LEVELS)


def forget_time(model, layer=0):
    """Zeroes the router's weights of the timestep: then only the tokens decide."""
    gate = model.transformer_blocks[layer].img_mlp.gate
    with torch.no_grad():
        gate.weight[:, : gate.weight.shape[1] // 2] = 0
        gate.weight[:, gate.weight.shape[1] // 2 :].normal_()


def modulate_by_time(model, layer=0):
    """Makes scale2, which multiplies what experts see (and coupled routers), depend on the timestep."""
    weight = model.transformer_blocks[layer].img_mod[1].weight
    with torch.no_grad():
        weight.chunk(4)[2].normal_(std=0.5)


def test_a_router_that_sees_the_same_at_every_timestep_is_stable():
    model = model_of()
    forget_time(model)
    numbers = describe_layer(model, 0, watch(model)[0])
    assert numbers["jaccard"] == 1.0 and numbers["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["distinct"] == pytest.approx(2.0)  # the two experts that take a token on average
    assert numbers["jaccard_between_timesteps"] == [1.0] * 3


def test_modulation_unsettles_a_coupled_router_and_not_a_decoupled_one():
    result = {}
    for coupled in (False, True):
        model = model_of(routing={"coupled": coupled})
        forget_time(model)
        modulate_by_time(model)
        result[coupled] = describe_layer(model, 0, watch(model)[0])
    assert result[False]["jaccard"] == 1.0
    assert result[True]["jaccard"] < 0.9 and result[True]["cosine"] < 0.95
    assert result[True]["distinct"] > result[False]["distinct"]


def test_a_router_that_sees_the_timestep_or_other_tokens_is_less_stable():
    model = model_of()
    forget_time(model)
    assert describe_layer(model, 0, watch(model, same_noise=False)[0])["jaccard"] < 1.0


def test_independent_routing_has_the_jaccard_of_chance():
    generator = torch.Generator().manual_seed(0)
    taken = torch.rand(2, 1, 20000, 64, generator=generator) < 0.25
    both, either = (taken[0] & taken[1]).sum(), (taken[0] | taken[1]).sum()
    assert (both / either).item() == pytest.approx(0.25 / (2 - 0.25), rel=0.01)
    assert jaccard(taken[0], taken[1]).mean().item() == pytest.approx(0.25 / (2 - 0.25), rel=0.02)


def test_jaccard_and_cosine_equal_their_definitions():
    sets = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert jaccard(sets[0], sets[1]).item() == 1 / 4
    assert jaccard(sets, sets).tolist() == [1.0, 1.0, 1.0]
    assert jaccard(sets[0], sets[2]).item() == 0.0
    gates = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]])
    assert gate_cosine(gates[0], gates[1]).item() == pytest.approx(24 / 25)
    assert gate_cosine(gates, gates).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert gate_cosine(gates[0], gates[2]).item() == 0.0


def test_pair_cosines_of_known_vectors():
    assert mean_pair_cosine(torch.eye(5) * 3).item() == pytest.approx(0.0, abs=1e-7)
    assert mean_pair_cosine(torch.ones(5, 3)).item() == pytest.approx(1.0)
    signs = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    assert mean_pair_cosine(signs).item() == pytest.approx(-1 / 3)
    assert mean_pair_cosine(signs, absolute=True).item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least two experts, got 1"):
        mean_pair_cosine(torch.ones(1, 3))


def test_experts_that_compute_the_same_have_output_cosine_1_and_others_less():
    torch.manual_seed(0)
    experts, tokens = Experts(4, 12, 64), torch.randn(50, 12)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert abs(expert_output_cosine(experts, tokens)) < 0.5
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert expert_output_cosine(experts, tokens) == pytest.approx(1.0, abs=1e-5)


def test_maps_have_the_orientation_of_the_image_and_count_every_assignment():
    """A router steered by one channel of the token takes the tokens where that channel is high."""
    model = model_of()
    routing = watch(model, same_noise=False)[0]
    maps = token_maps(routing, rows=4, columns=2)
    assert maps["experts"].shape == (3, 4, 4, 2) and maps["jaccard"].shape == maps["distinct"].shape == (3, 4, 2)
    assert (maps["experts"].sum((-2, -1)) == 4 * 4).all()  # 4 experts take 4 of 8 tokens each
    for t in range(4):
        for row in range(4):
            for column in range(2):
                assert maps["experts"][1, t, row, column] == routing.taken_TBSE[t, 1, row * 2 + column].sum()


def test_watching_leaves_the_model_as_it_was_and_equals_a_plain_forward():
    from model.transformer import RouterTrace

    model = model_of(layers=2)
    routing = watch(model, same_noise=False)
    assert sorted(routing) == [0, 1]
    assert not any(block.img_mlp._forward_pre_hooks for block in model.transformer_blocks)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 4, 8, 4, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    text, trace, t = torch.randn(3, 5, 24, generator=generator), RouterTrace(), torch.full((3,), LEVELS[2])
    noisy = flow.interpolate(flow.pack_latents(clean), flow.pack_latents(noise), t)
    model(hidden_states=noisy, img_shapes=(1, 4, 2), encoder_hidden_states=text, timestep=t, collect=trace)
    assert torch.equal(routing[1].taken_TBSE[2], trace.layers[1].taken_BSE())


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no MoE layer"):
        watch(model_of(routing={"kind": "dense"}, mlp_ratio=8.0))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    with LatentWriter(directory, text_dim=24, rows_per_file=20, latent_channels=4) as writer:
        for length in (1, 3, 5):
            writer.add_text(torch.randn(length, 24, generator=generator))
        for i in range(7):
            size = (8, 8) if i % 3 else (4, 8)
            writer.add_image(f"{i:064x}", torch.randn(4, *size, generator=generator), "A1", [1 + i % 2])
    return directory


@pytest.mark.slow
def test_the_command_draws_an_exported_model_and_writes_its_numbers(latents, tmp_path, capsys):
    model = model_of(layers=2)
    export_transformer(model, tmp_path / "merged" / "transformer")
    options = ["--latents", str(latents), "--images", "2", "--timesteps", "2"]
    assert main([str(tmp_path / "merged"), *options, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert report["bucket"] == "64x64" and report["images"] == [f"{i:064x}" for i in (1, 5)]
    assert set(report["layers"]) == {"00", "01"} and "layer mean: jaccard" in capsys.readouterr().out
    assert report["mean"]["jaccard"] == pytest.approx(sum(n["jaccard"] for n in report["layers"].values()) / 2)
    maps = load_file(tmp_path / "out" / "maps.safetensors")
    assert maps["layer01/experts"].shape == (2, 2, 4, 4)
    assert maps["layer01/experts"].float().mean().item() == pytest.approx(report["layers"]["01"]["experts_mean"][0])
    for name in ("image0.png", "image1.png", "stability.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_reads_the_weights_of_a_training_checkpoint(latents, tmp_path, capsys):
    import torch.distributed.checkpoint as dcp

    model = model_of()
    export_transformer(model, tmp_path / "merged" / "transformer")
    for step in (5, 10):
        dcp.save(model.state_dict(), checkpoint_id=str(tmp_path / "kept" / f"step-{step:08d}"), no_dist=True)
    options = ["--latents", str(latents), "--images", "1", "--timesteps", "2"]
    assert main([str(tmp_path / "kept"), *options, "--out", str(tmp_path / "out")]) == 2
    assert "is neither in a checkpoints artifact" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept" / "manifest.json").write_text(json.dumps({"config": {"model": model.config.model_dump()}}))
    assert main([str(tmp_path / "kept"), *options, "--out", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "merged" / "transformer"), *options, "--out", str(tmp_path / "same")]) == 0
    assert (tmp_path / "out" / "routing.json").read_text() == (tmp_path / "same" / "routing.json").read_text()
    assert main([str(tmp_path / "nothing"), *options, "--out", str(tmp_path / "out")]) == 2


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Where a stage keeps its run."""
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    with s3_bucket("runs"):
        yield "s3://runs/stage"


@pytest.mark.slow
def test_the_command_reads_the_weights_of_a_stage_that_is_being_trained(latents, tmp_path, place):
    """Its capacity factors are the stage's, which the model section need not have."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    model = model_of()
    export_transformer(model, tmp_path / "transformer")
    if place.startswith("/"):
        (tmp_path / "run" / "weights").mkdir(parents=True)
    for step in (5, 10):
        path = f"{place}/weights/step-{step:08d}"
        writer = FsspecWriter(path, sync_files=False, **storage.options(path))
        dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    section = model.config.model_dump(mode="json") | {"capacity_factors": 1.0}
    run = {"transformer": section, "train": {}, "stage": {"capacity_factors": model.config.capacity_factors}}
    storage.write_bytes(f"{place}/run.json", json.dumps(run).encode())
    options = ["--latents", str(latents), "--images", "1", "--timesteps", "2", "--device", "cpu"]
    assert main([str(tmp_path / "transformer"), *options, "--out", str(tmp_path / "same")]) == 0
    for checkpoint in (f"{place}/weights", f"{place}/weights/step-00000005"):
        assert main([checkpoint, *options, "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "routing.json").read_text() == (tmp_path / "same" / "routing.json").read_text()


def test_experts_are_compared_on_evenly_spaced_tokens_of_all_timesteps(monkeypatch):
    """As if all were kept and then subsampled, which takes too much memory."""
    import model.routing_report as routing

    all_ND = watch(model_of(), same_noise=False)[0].inputs_ND  # 4 timesteps of 3 x 8 tokens, fewer than OUTPUT_TOKENS
    assert len(all_ND) == 96
    monkeypatch.setattr(routing, "OUTPUT_TOKENS", 13)
    assert torch.equal(watch(model_of(), same_noise=False)[0].inputs_ND, all_ND[::7])


def test_a_model_is_assembled_on_the_given_device(tmp_path):
    """Each weight goes there as it is read."""
    export_transformer(model_of(), tmp_path)
    assert {p.device.type for p in find_transformer(tmp_path, "meta").parameters()} == {"meta"}
    assert {p.device.type for p in find_transformer(tmp_path).parameters()} == {"cpu"}
