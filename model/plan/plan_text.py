"""A plan as text for the terminal."""

from __future__ import annotations

from typing import Any

from model.plan.gpus import NODE
from model.plan.memory import Layout


def _gb(bytes_: float) -> str:
    return f"{bytes_ / 1e9:,.2f} GB"


def _days(report: dict[str, Any]) -> str:
    cost = "" if report["cost"] is None else f", cost {report['cost']:,.0f}"
    return f"{report['days']:,.1f} days, {report['gpu_hours']:,.0f} GPU-hours{cost}"


def _network_line(report: dict[str, Any], gpu: dict[str, Any], mfu: float) -> str:
    seconds, moved = report["network_floor_s"], report["bytes_per_step"]["between_nodes"]
    line = (
        f"  network between nodes at least {seconds:.3f} s: {_gb(moved)} through each GPU's link at "
        f"{gpu['network'] * 8 / 1e9:g} Gb/s (of {NODE} GPUs a node)"
    )
    if seconds <= report["step_s"]:
        return line
    reached = mfu * report["step_s"] / seconds
    return f"{line}: IT MAY DOMINATE, the MFU is at most {reached:.2f} even if computation hides all of it"


def _stage_lines(report: dict[str, Any], gpu: dict[str, Any], mfu: float) -> list[str]:
    memory, flops, moved = report["memory_bytes"], report["flops"], report["bytes_per_step"]
    total = sum(flops["forward"].values())
    shares = ", ".join(f"{part} {value / total:.1%}" for part, value in flops["forward"].items())
    return [
        f"  layout: {Layout(**report['layout'])}",
        f"  active per image token: {report['active_parameters_per_image_token']:,} of {report['parameters']:,} "
        f"({report['image_tokens']} image tokens, {report['text_tokens']} text tokens assumed)",
        f"  memory per GPU: peak {_gb(memory['peak'])} of {_gb(report['usable_bytes'])} usable: "
        f"{'fits' if report['fits'] else 'DOES NOT FIT'} ({report['memory_moment']})",
        *(f"    {part:21} {_gb(value):>13}" for part, value in memory.items() if part != "peak"),
        f"  FLOPs per step: {flops['forward_and_backward']:.3e} forward and backward "
        f"({report['hardware_flops']:.3e} with recomputation and Newton-Schulz)",
        f"    of the forward: {shares}",
        "  bytes per step and GPU: " + ", ".join(f"{part} {_gb(value)}" for part, value in moved.items()),
        f"  step {report['step_s']:.3f} s (GPU memory traffic alone at least {report['memory_floor_s']:.3f} s), "
        f"{report['images_per_s']:,.0f} images/s, {_days(report)}",
        _network_line(report, gpu, mfu),
        f"  exposed communication: about {report['exposed_rows_s']:.3f} s for experts' rows (minus the shared expert's "
        "computation)",
    ]


def render(result: dict[str, Any]) -> str:
    """The result of `planner.plan` as text."""
    gpu, parameters, sizes = result["gpu"], result["parameters"], result["checkpoint_bytes"]
    lines = [
        f"{result['gpus']} x {gpu['name']}: {gpu['flops'] / 1e12:g} TFLOP/s bf16 dense, {gpu['memory'] / 1e9:g} GB, "
        f"{gpu['bandwidth'] / 1e12:g} TB/s, {gpu['network'] * 8 / 1e9:g} Gb/s ({gpu['source']}); "
        f"MFU {result['mfu']:g} assumed, {result['dtype']}",
        f"NOTE: {result['note']}",
        f"parameters: {parameters['total']:,} (Muon {parameters['muon']:,}, AdamW {parameters['adamw']:,}, "
        f"frozen {parameters['frozen']:,})",
        "checkpoints: " + ", ".join(f"{name} {_gb(size)}" for name, size in sizes.items()),
    ]
    for report in result["stages"]:
        lines += ["", report["stage"], *_stage_lines(report, gpu, result["mfu"])]
        if fitting := report.get("suggestion"):
            lines += ["  a layout that fits:", *("  " + line for line in _stage_lines(fitting, gpu, result["mfu"]))]
        elif not report["fits"]:
            lines.append("  no micro-batch, checkpointing, sharding or expert-parallel degree fits on these GPUs")
    hint = " (--cost-per-gpu-hour adds the cost)" if result["cost"] is None else ""
    return "\n".join([*lines, "", f"all stages: {_days(result)}{hint}"])
