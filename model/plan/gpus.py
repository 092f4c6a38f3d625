"""GPUs that a plan can be made for, with their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8  # GPUs per node, connected by NVLink; each has its own network link to other nodes


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # dense bf16 tensor-core peak per second, without sparsity
    memory: float  # bytes
    bandwidth: float  # bytes per second to GPU memory
    network: float  # bytes per second and direction, to other nodes
    nvlink: float  # bytes per second and direction, to the other GPUs of the node
    source: str


_HOPPER = "SXM: 1,979 TFLOP/s with sparsity, halved; network: DGX data sheet, 8 ConnectX-7 of 400 Gb/s for 8 GPUs"
_AMPERE = "80GB SXM: 312 TFLOP/s without sparsity; network: DGX data sheet, 8 ConnectX-6 of 200 Gb/s for 8 GPUs"
GPUS = {
    "h100": Gpu("h100", 989e12, 80e9, 3.35e12, 50e9, 450e9, f"NVIDIA H100 data sheet, {_HOPPER}"),
    "h200": Gpu("h200", 989e12, 141e9, 4.8e12, 50e9, 450e9, f"NVIDIA H200 data sheet, {_HOPPER}"),
    "a100": Gpu("a100", 312e12, 80e9, 2.039e12, 25e9, 300e9, f"NVIDIA A100 data sheet, {_AMPERE}"),
}
