import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import SMALL
from torch.utils.flop_counter import FlopCounterMode

from model.config import RoutingConfig, StageConfig, TransformerConfig
from model.optim import Muon, parameter_groups
from model.plan.memory import Layout, Shapes, moments
from model.plan.memory_trace import Step
from model.plan.planner import (
    CHECKPOINTING,
    GPUS,
    USABLE,
    active_parameters,
    forward_flops,
    load_sections,
    main,
    plan,
    plan_stage,
    suggest,
    traffic,
)
from model.transformer import NucleusTransformer

RECIPE = Path(__file__).parents[4] / "recipes" / "nucleus_17b.yaml"
CONFIG = TransformerConfig(**SMALL | {"num_key_value_heads": 2, "capacity_factors": (1.0, 2.0, 3.0)})
STATE = {"weights", "gradients", "optimizer_muon", "optimizer_adamw"}
PASSES = {"activations", "workspace", "gathered_weights", "gathered_gradients", "all_to_all"}


@pytest.fixture(scope="module")
def sections():
    return load_sections(RECIPE)


@pytest.fixture(scope="module")
def shapes(sections):
    return Shapes(sections[0])


def test_totals_are_the_released_ones(sections, shapes):
    assert shapes.total == 16_922_679_296
    assert shapes.muon + shapes.adamw + shapes.frozen == shapes.total
    assert shapes.frozen == 32 * 128  # norm_added_q


@pytest.mark.slow
def test_checkpoints_have_the_sizes_of_the_released_weights_and_of_the_optimizers_state(sections, shapes):
    sizes = plan(*sections, GPUS["h100"])["checkpoint_bytes"]
    assert sizes["model_bf16"] == 33_845_358_592
    assert sizes["full"] == 4 * (shapes.total + shapes.muon + 2 * shapes.adamw)


def test_about_two_billion_parameters_are_active(sections, shapes):
    model = sections[0]
    assert active_parameters(shapes, model, 4096) == pytest.approx(2e9, rel=0.1)
    everything = TransformerConfig(**{**model.model_dump(), "capacity_factors": 64.0})
    assert active_parameters(shapes, everything, 4096) == shapes.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text_tokens", [3, 50])
def test_flops_are_those_that_pytorch_counts(dtype, text_tokens):
    """On the meta device: the counter does not support the CPU's fused attention."""
    fp32 = dtype == torch.float32
    planned = forward_flops(CONFIG, 256, text_tokens, batch=2, fp32=fp32)
    assert sum(planned.values()) == _counted(CONFIG, 16, text_tokens, dtype)


@pytest.mark.slow
def test_flops_of_the_17b_model_are_those_that_pytorch_counts(sections):
    planned = forward_flops(sections[0], 4096, 512, batch=2)
    assert sum(planned.values()) == _counted(sections[0], 64, 512, torch.bfloat16)


def _counted(config, side, text_tokens, dtype):
    with torch.device("meta"):
        model = NucleusTransformer(config).to(dtype)
        latents = torch.empty(2, side * side, config.in_channels, dtype=dtype)
        text = torch.empty(2, text_tokens, config.joint_attention_dim, dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            model(latents, (1, side, side), text, timestep=torch.empty(2, dtype=dtype))
    return counter.get_total_flops()


def test_flops_of_newton_schulz_are_those_that_pytorch_counts():
    with torch.device("meta"):
        muon = Muon(parameter_groups(NucleusTransformer(CONFIG))["muon"], ns_steps=3)
    for parameter in muon.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == 3 * Shapes(CONFIG).newton_schulz_flops


def steps(stage, layout, tokens=4096, dtype=torch.bfloat16):
    accumulate = stage.batch_size // layout.gpus > layout.micro_batch
    return Step(layout.micro_batch, tokens, 512, dtype, layout.checkpointing, accumulate=accumulate)


def memory(shapes, model, stage, layout, **options):
    result = moments(shapes, model, layout, steps(stage, layout, **options))
    return max(result, key=lambda moment: moment.total), result


@pytest.mark.parametrize(
    "layout",
    [
        Layout(64, 64, 64, 4, "full"),
        pytest.param(Layout(64, 32, 8, 1, "selective"), marks=pytest.mark.slow),
        pytest.param(Layout(8, 1, 1, 1, "full"), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_peak_is_the_sum_of_its_parts(sections, shapes, layout):
    model, train = sections
    stage = train.stages[2]
    peak, result = memory(shapes, model, stage, layout)
    report = plan_stage(shapes, model, train, stage, layout, GPUS["h100"])
    parts = dict(report["memory_bytes"])
    assert parts.pop("peak") == sum(parts.values())
    assert report["memory_moment"] in {moment.name for moment in result}
    assert STATE <= set(parts) <= STATE | PASSES
    assert result[-1].parts["gradients"] == 4 * shapes.trainable_per_gpu(layout)
    assert any(moment.parts.get("all_to_all") for moment in result) == (layout.expert_parallel > 1)
    assert any(moment.parts.get("gathered_weights") for moment in result) == (layout.shard > 1)
    summed = [moment.parts for moment in result if moment.name == "sum over replicas"]  # FSDP does it block by block
    assert [parts["workspace"] for parts in summed] == [4 * shapes.trainable_per_gpu(layout)] * (layout.shard == 1)


@pytest.mark.slow
def test_checkpointing_keeps_less_in_the_order_of_its_names(sections, shapes):
    model, train = sections
    kept = [
        max(
            m.parts.get("activations", 0) for m in memory(shapes, model, train.stages[2], Layout(64, 64, 1, 4, name))[1]
        )
        for name in ("none", "selective", "full")
    ]
    assert kept[0] > 1.5 * kept[1] > 1.5 * 1.5 * kept[2]


def test_state_is_sharded_by_the_shard_degree(shapes):
    whole = Layout(64, 1, 1, 1, "none")
    assert shapes.per_gpu(whole) == shapes.total
    routers = 29 * 64 * 4096  # whole everywhere
    for shard, ep in ((64, 1), (64, 64), (32, 4)):
        per_gpu = shapes.per_gpu(replace(whole, shard=shard, expert_parallel=ep))
        assert 0 <= per_gpu - routers - (shapes.total - routers) / shard < 0.001 * per_gpu
    three = Layout(
        3, 3, 1, 1, "none"
    )  # FSDP2 pads rows: 128 to 3 x 43; of 4 experts it cuts each, here 20 rows to 3 x 7
    assert Shapes(CONFIG).per_gpu(three, prefix="img_in.bias") == 43
    assert Shapes(CONFIG).per_gpu(three, prefix="transformer_blocks.1.img_mlp.experts.down_proj") == 4 * 7 * 128


@pytest.mark.slow
def test_buffers_are_the_rows_that_experts_take_and_the_units_that_fsdp_gathers(sections, shapes):
    model, train = sections
    layout = Layout(64, 64, 64, 4, "full")
    _, result = memory(shapes, model, train.stages[2], layout)
    rows = 4 * 64 * 256  # samples, experts, capacity 4.0 x 4096 / 64
    by_name = {moment.name: moment.parts for moment in result}
    for way in ("forward", "backward"):
        assert by_name[f"{way} of block 3"]["all_to_all"] == 2 * rows * 2048 * 2
        assert by_name[f"{way} of block 2"]["all_to_all"] == 0
    ends, units = shapes.units(layout)
    backward = by_name["backward of block 3"]
    assert backward["gathered_weights"] == 2 * (
        ends + sum(units[3]) + units[2][0]
    )  # bf16; those of block 2 are under way
    assert backward["gathered_gradients"] == 4 * max(*units[3], units[4][0])  # fp32, the largest that is being reduced


def test_bytes_of_a_step_follow_from_the_rings_and_from_what_each_pass_reads(sections, shapes):
    """By hand, at 1024 px: 4096 tokens, so that an expert takes 256 in two layers and 128 in 27."""
    model, train = sections

    def moved(*layout):
        return traffic(shapes, model, Layout(*layout), train.stages[2], tokens=4096, element=2, activations=1000)

    rows, experts = 64 * (2 * 256 + 27 * 128), 29 * 64 * 3 * 2048 * 1344
    dense = shapes.total - experts
    whole_experts = moved(64, 64, 64, 4, "full")
    assert whole_experts["network_weights"] == pytest.approx(2 * 2 * dense * 63 / 64)  # bf16, forward and backward
    assert whole_experts["network_gradients"] == pytest.approx(4 * dense * 63 / 64)
    there_and_back = 2 * 4 * rows * 2048 * 2 * 63 / 64  # 4 samples
    assert whole_experts["network_all_to_all"] == pytest.approx(3 * there_and_back)  # the forward twice
    assert whole_experts["memory_weights"] == pytest.approx(4 * 2 * (dense + experts / 64))
    muon, adamw = (shapes.per_gpu(Layout(64, 64, 64, 4, "full"), group) for group in ("muon", "adamw"))
    assert whole_experts["memory_optimizer"] == 20 * muon + 28 * adamw
    assert whole_experts["memory_activations"] == 2 * 1000
    micro_steps = moved(64, 64, 64, 2, "selective")
    assert micro_steps["network_weights"] == pytest.approx(2 * whole_experts["network_weights"])
    assert micro_steps["network_gradients"] == pytest.approx(2 * whole_experts["network_gradients"])
    assert micro_steps["network_all_to_all"] == pytest.approx(2 * there_and_back)
    assert micro_steps["memory_weights"] == pytest.approx(2 * 3 * 2 * (dense + experts / 64))
    assert micro_steps["memory_activations"] == 2 * 2 * 1000
    replicas = moved(8, 1, 1, 1, "full")
    assert replicas["network_weights"] == replicas["network_all_to_all"] == 0
    assert replicas["network_gradients"] == pytest.approx(2 * 4 * shapes.total * 7 / 8)
    both = moved(8, 4, 1, 1, "full")  # 32 micro-steps
    assert both["network_gradients"] == pytest.approx(
        32 * 4 * shapes.total * 3 / 4 + 2 * 4 * shapes.total / 4 * 1 / 2,
        rel=1e-3,  # routers are whole, rows are padded
    )


def test_traffic_of_a_gpus_link_leaves_out_what_its_node_shares(sections, shapes):
    """By hand, for nodes of 8. A ring enters a node once for all its ranks there; a row goes straight to its expert."""
    model, train = sections
    experts = 29 * 64 * 3 * 2048 * 1344
    dense = shapes.total - experts

    def between(*layout):
        result = traffic(shapes, model, Layout(*layout), train.stages[2], tokens=4096, element=2, activations=0)
        return result["between_nodes"], result["network_all_to_all"]

    ring = 2 * 2 + 4  # bytes of a weight: gathered in bf16 by both passes, and its gradient reduced in fp32
    result, rows = between(64, 64, 64, 4, "selective")
    assert result == pytest.approx(ring * dense * 63 / 64 / 8 + rows * 56 / 63)
    result, rows = between(64, 64, 8, 4, "selective")  # each ring of experts: a rank of each node
    assert rows > 0 and result == pytest.approx(ring * (dense * 63 / 64 / 8 + experts / 8 * 7 / 8))
    result, _ = between(64, 64, 4, 4, "selective")  # of each of 4 rings, 2 ranks are in a node
    assert result == pytest.approx(ring * (dense * 63 / 64 / 8 + experts / 4 * 15 / 16 / 2))
    result, _ = between(16, 8, 1, 16, "selective")  # a replica in each of two nodes
    assert result == pytest.approx(2 * 4 * shapes.per_gpu(Layout(16, 8, 1, 16, "selective")) / 2)
    assert between(8, 8, 8, 32, "selective")[0] == between(8, 4, 2, 32, "selective")[0] == 0


@pytest.mark.slow
def test_the_recipes_layout_keeps_the_exchange_of_rows_inside_a_node_and_exposes_less_of_it(sections):
    ours, papers = (plan(*sections, GPUS["h100"], expert_parallel=degree)["stages"] for degree in (None, 64))
    for one, other in zip(ours, papers):
        assert (one["layout"]["expert_parallel"], other["layout"]["expert_parallel"]) == (8, 64)
        assert one["bytes_per_step"]["between_nodes_rows"] == 0
        assert other["bytes_per_step"]["between_nodes_rows"] == pytest.approx(
            other["bytes_per_step"]["network_all_to_all"] * 56 / 63
        )
        assert one["exposed_rows_s"] < 0.1 * other["exposed_rows_s"]
        # No more communication overlaps than there is computation.
        assert one["network_floor_s"] < one["step_s"] and one["network_floor_s"] < other["network_floor_s"]


@pytest.mark.slow
def test_the_plan_gives_the_seconds_of_the_network_and_warns_where_it_may_dominate(capsys):
    command = [str(RECIPE), "--gpus", "64", "--json"]
    result = {}
    for options in ((), ("--network-gbps", "100"), ("--gpu", "a100")):
        assert main([*command, *options]) == 0
        result[options] = json.loads(capsys.readouterr().out)["stages"]
    for options, rate in ((), 50e9), (("--network-gbps", "100"), 12.5e9), (("--gpu", "a100"), 25e9):
        for stage in result[options]:
            assert stage["network_floor_s"] == pytest.approx(stage["bytes_per_step"]["between_nodes"] / rate)
    assert [a["step_s"] for a in result[()]] == [b["step_s"] for b in result["--network-gbps", "100"]]
    last = result[()][2]
    assert last["network_floor_s"] < last["step_s"] < 4 * last["network_floor_s"]
    for rate, dominates in ((400, False), (100, True)):
        assert main([*command[:-1], "--network-gbps", str(rate)]) == 0
        line = [line for line in capsys.readouterr().out.splitlines() if "network between nodes" in line][2]
        assert f"at {rate} Gb/s" in line and ("IT MAY DOMINATE" in line) == dominates
    mfu = 0.35 * last["step_s"] / (4 * last["network_floor_s"])
    assert f"the MFU is at most {mfu:.2f}" in line


@pytest.mark.slow
def test_the_hardware_computes_newton_schulz_and_what_is_recomputed_too_and_reads_its_memory(sections):
    train = sections[1]
    stage, small = train.stages[0].model_copy(update={"capacity_factors": 2.0, "batch_size": 8}), Shapes(CONFIG)

    def beyond(*layout):
        report = plan_stage(small, CONFIG, train, stage, Layout(*layout), GPUS["h100"])
        read = sum(value for name, value in report["bytes_per_step"].items() if name.startswith("memory_"))
        assert report["memory_floor_s"] == pytest.approx(read / 3.35e12)
        return report["hardware_flops"] - report["flops"]["forward_and_backward"]

    forward = 8 * sum(forward_flops(CONFIG.with_capacity_factors(2.0), 256, 512).values())
    once = 5 * small.newton_schulz_flops
    assert beyond(8, 8, 4, 1, "selective") == once  # this recomputes no products
    assert beyond(8, 8, 4, 1, "full") == once + forward
    assert beyond(8, 2, 2, 1, "full") == 4 * once + forward  # each copy of the weights is updated by itself


@pytest.mark.slow
def test_a_plan_says_whose_muon_its_memory_is_of(sections):
    model, train = sections
    assert "torchtitan" not in plan(model, train, GPUS["h100"], gpus=64)["note"]
    train = train.model_copy(update={"muon_implementation": "torchtitan"})
    assert "this project's implementation" in plan(model, train, GPUS["h100"], gpus=64)["note"]


@pytest.mark.slow
def test_what_is_not_given_is_the_recipes(sections):
    changes = {
        "nnodes": 4,
        "nproc_per_node": 8,
        "data_parallel_replicate": 2,
        "expert_parallel": 4,
        "local_batch_size": 2,
    }
    stages = [stage.model_copy(update={"capacity_factors": 2.0}) for stage in sections[1].stages[:2]]
    train = sections[1].model_copy(update={**changes, "stages": tuple(stages)})
    result = plan(CONFIG, train, GPUS["h100"], cost_per_gpu_hour=2.0)
    layouts = [Layout(**stage["layout"]) for stage in result["stages"]]
    assert layouts == [Layout(32, 16, 4, 2, train.activation_checkpointing)] * 2
    assert result["cost"] == pytest.approx(sum(stage["cost"] for stage in result["stages"]))
    assert result["cost"] > max(stage["cost"] for stage in result["stages"])


@pytest.mark.slow
def test_a_small_gpu_does_not_fit_and_the_suggestion_does(sections, shapes):
    """The suggestion is the layout with the necessary changes: more checkpointing, and the largest micro-batch that
    fits."""
    model, train = sections
    small = replace(GPUS["h100"], memory=12e9)
    fits = lambda layout: plan_stage(shapes, model, train, stage, layout, small)["fits"]  # noqa: E731
    for stage in train.stages:
        asked = Layout(64, 64, 64, stage.batch_size // 64, "none")
        assert not fits(asked)
        layout = suggest(shapes, model, train, stage, asked, small)
        report = plan_stage(shapes, model, train, stage, layout, small)
        assert report["fits"] and report["memory_bytes"]["peak"] <= USABLE * 12e9
        assert layout.gpus == 64 and stage.batch_size % (64 * layout.micro_batch) == 0
        assert (layout.shard, layout.expert_parallel) == (64, 64)
        whole_share = 64 * layout.micro_batch == stage.batch_size
        assert whole_share or not fits(replace(layout, micro_batch=2 * layout.micro_batch))
        less = CHECKPOINTING[: CHECKPOINTING.index(layout.checkpointing)]
        assert not any(fits(replace(layout, micro_batch=1, checkpointing=name)) for name in less)
    assert suggest(shapes, model, train, stage, asked, replace(small, memory=4e9)) is None


@pytest.mark.slow
def test_every_stage_of_the_published_recipe_fits_its_64_gpus_of_80_gb(sections, shapes):
    """If a rank's share of a batch does not fit, in accumulation steps."""
    reports = plan(*sections, GPUS["h100"], gpus=64)["stages"]
    assert [report["fits"] for report in reports] == [True] * 3
    assert [report["layout"]["micro_batch"] for report in reports] == [32, 16, 4]
    model, train = sections
    whole_share = Layout(64, 64, 8, 64, train.activation_checkpointing)
    assert not plan_stage(shapes, model, train, train.stages[0], whole_share, GPUS["h100"])["fits"]


@pytest.mark.slow
def test_a_plan_that_does_not_fit_names_a_layout_or_says_none(capsys):
    assert main([str(RECIPE), "--gpus", "1", "--expert-parallel", "1", "--micro-batch", "1"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "no micro-batch, checkpointing, sharding" in out
    assert main([str(RECIPE), "--gpus", "16", "--expert-parallel", "1", "--checkpointing", "none"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "a layout that fits" in out


@pytest.mark.slow
def test_steps_that_train_guidance_in_cost_one_more_forward_and_little_memory(sections, shapes):
    model, train = sections
    stage, layout = train.stages[2], Layout(64, 64, 64, 4, "full")
    guided, weaker = (
        StageConfig(**{**stage.model_dump(), "guidance": {"steps": stage.steps // 4, "scale": 3.0, **more}})
        for more in ({}, {"autoguidance": 1.5})
    )
    before, after, autoguided = (
        plan_stage(shapes, model, train, each, layout, GPUS["h100"]) for each in (stage, guided, weaker)
    )
    forward = sum(before["flops"]["forward"].values())
    added = after["flops"]["forward_and_backward"] - before["flops"]["forward_and_backward"]
    assert added == pytest.approx(forward / 4) and after["days"] == pytest.approx(before["days"] * 3.25 / 3)
    assert 0 <= after["memory_bytes"]["peak"] - before["memory_bytes"]["peak"] < 4 * 4096 * 64 * 4 * 8
    added = autoguided["flops"]["forward_and_backward"] - after["flops"]["forward_and_backward"]
    assert added == pytest.approx(forward / 4)  # the weaker model's forward
    assert autoguided["memory_bytes"]["weaker_model"] == 4 * shapes.per_gpu(layout)
    assert autoguided["memory_bytes"]["peak"] - after["memory_bytes"]["peak"] == 4 * shapes.per_gpu(layout)


@pytest.mark.slow
def test_time_and_cost_follow_from_flops(sections, shapes):
    model, train = sections
    stage, layout = train.stages[2], Layout(64, 64, 64, 4, "full")
    report = plan_stage(shapes, model, train, stage, layout, GPUS["h100"], mfu=0.5, cost_per_gpu_hour=2.0)
    flops = 3 * 256 * sum(forward_flops(model, 4096, 512).values())
    assert report["flops"]["forward_and_backward"] == flops
    assert report["step_s"] == pytest.approx(flops / (64 * 989e12 * 0.5))
    assert report["days"] == pytest.approx(report["step_s"] * 200_000 / 86400)
    assert report["gpu_hours"] == pytest.approx(report["days"] * 24 * 64)
    assert report["cost"] == pytest.approx(report["gpu_hours"] * 2.0)
    assert plan_stage(shapes, model, train, stage, layout, GPUS["h100"])["cost"] is None


@pytest.mark.slow
def test_the_command_says_what_its_numbers_are(capsys):
    command = [str(RECIPE), "--gpus", "64", "--gpu", "h100"]
    assert main(command) == 0
    text, data = capsys.readouterr().out.split("\ndata: ")
    assert data.startswith("700,000,000 images")
    assert "against measured peaks of small models" in text and "nothing was measured on these GPUs" in text
    assert "checkpointing selective" in text and "no separate terms for network" in text
    hours = [float(results.replace(",", "")) for results in re.findall(r"([\d,]+) GPU-hours", text)]
    assert len(hours) == 4 and sum(hours[:3]) == pytest.approx(hours[3], abs=2)
    assert text.endswith("GPU-hours (--cost-per-gpu-hour adds the cost)\n")
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for stage in result["stages"]:
        assert stage["fits"] or stage["suggestion"]["fits"]
    assert math.isclose(result["days"], sum(stage["days"] for stage in result["stages"]))
    assert math.isclose(result["gpu_hours"], result["days"] * 24 * 64)
    assert main([*command, "--cost-per-gpu-hour", "2"]) == 0
    assert f" GPU-hours, cost {2 * result['gpu_hours']:,.0f}\n\ndata: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("ablations/*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_is_planned(capsys, path):
    assert main([str(path), "--gpus", "2", "--json"]) == 0
    assert all(stage["fits"] for stage in json.loads(capsys.readouterr().out)["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("factor, limit, planned", [(2.0, None, 2.0), (2.0, 1.5, 3.0), (4.0, 1.5, 4.0)])
def test_token_choice_is_planned_at_its_limit_or_at_an_even_load(sections, factor, limit, planned):
    """With 4 experts: none can take more than all tokens."""

    def experts(routing, factor):
        stage = sections[1].stages[1].model_copy(update={"capacity_factors": factor})
        train = sections[1].model_copy(update={"stages": (stage,), "expert_parallel": 1})
        result = plan(CONFIG.model_copy(update={"routing": routing}), train, GPUS["h100"], gpus=1, micro_batch=1)
        assert ("the most loaded expert of a batch sets the number of rows" in result["note"]) == (
            routing.kind != "expert_choice"
        )
        return result["stages"][0]["flops"]["forward"]["experts"]

    token_choice = RoutingConfig(kind="token_choice", expert_limit=limit)
    assert experts(token_choice, factor) == experts(RoutingConfig(), planned)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--gpus", "48", "--expert-parallel", "64"],
            "shard ranks 48 must be a multiple of expert_parallel 64: 48 = 0 x 64 + 48",
        ),
        (["--gpus", "64", "--shard", "24"], "GPUs 64 must be a multiple of shard 24: 64 = 2 x 24 + 16"),
        (["--gpus", "48", "--expert-parallel", "48"], "num_experts 64 must be a multiple of expert_parallel 48"),
        (
            ["--gpus", "48", "--expert-parallel", "1"],
            "batch_size 4096 must be a multiple of GPUs 48: 4096 = 85 x 48 + 16",
        ),
        (["--gpus", "64", "--micro-batch", "3"], "samples per GPU and step 64 must be a multiple of micro_batch 3"),
        (["--gpus", "64", "--micro-batch", "0"], "micro_batch is under 1"),
        (["--gpus", "64", "--expert-parallel", "0"], "expert_parallel is under 1"),
        (["--gpus", "0"], "gpus=0 must be at least 1"),
        (["--mfu", "1.5"], "mfu=1.5 must be in (0, 1]"),
        (["--cost-per-gpu-hour", "-1"], "cost_per_gpu_hour=-1.0"),
        (["--network-gbps", "0"], "network_gbps=0.0 must be above 0"),
    ],
)
def test_a_wrong_layout_is_one_line_with_the_arithmetic(capsys, options, message):
    assert main([str(RECIPE), *options]) == 2
    assert message in _one_line(capsys)


def test_a_wrong_recipe_is_one_line(capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in (
        (None, "No such file"),
        ("a: [", "is not valid YAML"),
        ("model: {}", "must have the sections model and train"),
        (RECIPE.read_text().replace("num_layers: 32", "num_layres: 32"), "model.num_layres"),
        (RECIPE.read_text().replace("image_size_px: 256", "image_size_px: 250"), "must be a multiple of 16"),
    ):
        if text is not None:
            path.write_text(text)
        assert main([str(path)]) == 2
        assert message in _one_line(capsys)


def test_numbers_and_ratios_are_read_as_yaml_1_2(tmp_path, sections):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.read_text().replace('"16:9"', "16:9").replace("muon_lr: 1.0e-4", "muon_lr: 1e-4")
    path.write_text(text)
    assert load_sections(path) == sections


def _one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_a_rank_is_not_taken_for_the_first_after_planning_in_the_same_process(monkeypatch):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from model.train.parallel.fake_ranks import first_rank_of

    def coordinates():
        with first_rank_of(2, 1, CONFIG) as model:
            copies = [p.detach() for p in model.parameters() if isinstance(p, DTensor)]
            return {tuple(copy.device_mesh.get_coordinate()) for copy in copies}

    assert coordinates() == {(0,)}
    start = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, rank, world_size: start(backend, None, rank=1, world_size=2)
    )
    assert coordinates() == {(1,)}
