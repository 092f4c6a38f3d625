"""Shared by the benchmarks: command and machine, medians and spread, matrix and memory rates."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def print_run(device: torch.device | str = "cpu") -> None:
    """The command and the machine."""
    print("command:", shlex.join(["python", *sys.argv]))
    card = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores ({_cpu_name()}){card}, torch {torch.__version__}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


class Spread(NamedTuple):
    """Median and spread of several measurements."""

    median: float
    low: float  # quartiles
    high: float
    least: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
        return cls(median, low, high, min(values), len(values))

    def __str__(self) -> str:
        return (
            f"{self.median:9.3f} (quartiles {self.low:.3f} to {self.high:.3f}, least {self.least:.3f}, n={self.count})"
        )


def milliseconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Mean wall time of `calls` consecutive calls, including the device's work. On CUDA one call may end before the
    device starts the clock: several keep it busy."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1000 * (time.perf_counter() - begin) / calls


def spin_up(device: torch.device, seconds: float = 1.0) -> None:
    """Keeps a GPU busy until its clocks have risen from their idle rate. Nothing on a CPU."""
    if device.type != "cuda":
        return
    side = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            side @ side
        torch.cuda.synchronize(device)


CUDA_CALLS = 10  # for each pair of events


def in_turns(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, Spread]:
    """Milliseconds of each, run in turns in each round, so that a busy machine disturbs all equally."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = CUDA_CALLS if device.type == "cuda" else 1
    for round_ in range(rounds + warm_up):
        for name, run in runs.items():
            value = milliseconds(run, device, calls if round_ >= warm_up else 1)
            if round_ >= warm_up:
                times[name].append(value)
    return {name: Spread.of(values) for name, values in times.items()}


SHOWN = 20  # rows of a table of products


class Product(NamedTuple):
    """`batch` matrix products [m, k] x [k, n] in one call; a side may be stored transposed."""

    batch: int
    m: int
    k: int
    n: int
    transpose_a: bool = False
    transpose_b: bool = False
    attention: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    def bytes(self, itemsize: int) -> int:
        """Bytes of each matrix, read or written once."""
        return itemsize * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)

    def __str__(self) -> str:
        a, b = ("T" if transposed else "N" for transposed in (self.transpose_a, self.transpose_b))
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}[{self.m}, {self.k}] x [{self.k}, {self.n}] {a}{b}{' attention' if self.attention else ''}"

    def alone(self, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
        """The same product on random matrices."""
        a = torch.randn(self.batch, *((self.k, self.m) if self.transpose_a else (self.m, self.k)), device=device)
        b = torch.randn(self.batch, *((self.n, self.k) if self.transpose_b else (self.k, self.n)), device=device)
        a, b = a.to(dtype), b.to(dtype)
        a, b = a.mT if self.transpose_a else a, b.mT if self.transpose_b else b
        if self.batch == 1:
            a, b = a[0], b[0]
            return lambda: torch.mm(a, b)
        return lambda: torch.bmm(a, b)


class RecordProducts(TorchDispatchMode):
    """Counts in `products` the matrix products that run inside the block, including backward passes.

    An attention kernel counts as its products: scores and values forward, and their four gradients backward
    (recomputation in a kernel is not counted). Queries of a group are rows of one product.
    """

    FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "_grouped_mm": (0, 1)}

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FACTORS:
            self._add(*(args[i] for i in self.FACTORS[name]))
        elif name.startswith(("_scaled_dot_product_", "_flash_attn")):
            backward = name.endswith("backward")
            q, k = (tuple(x.shape) for x in (args[1:3] if backward else args[:2]))
            if name.startswith("_flash_attn"):  # tokens before heads
                q, k = ((B, heads, tokens, H) for B, tokens, heads, H in (q, k))
            self._add_attention(q, k, backward)
        return func(*args, **(kwargs or {}))

    def _add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dim() == 2 and b.dim() == 3:  # grouped rows: equally many for each matrix
            a = a.unflatten(0, (b.shape[0], -1))
        transposed = (x.stride(-1) != 1 and x.stride(-2) == 1 for x in (a, b))
        batch = a.shape[0] if a.dim() == 3 else 1
        self.products[Product(batch, *a.shape[-2:], b.shape[-1], *transposed)] += 1

    def _add_attention(self, q: tuple[int, ...], k: tuple[int, ...], backward: bool) -> None:
        batch, rows, keys, head_dim = k[0] * k[1], q[1] * q[2] // k[1], k[2], q[3]
        self.products[Product(batch, rows, head_dim, keys, False, True, True)] += 1
        self.products[Product(batch, rows, keys, head_dim, False, False, True)] += 1
        if backward:
            self.products[Product(batch, keys, rows, head_dim, True, False, True)] += 2


class ProductTime(NamedTuple):
    product: Product
    count: int
    spread: Spread  # milliseconds of one

    @property
    def total_ms(self) -> float:
        return self.count * self.spread.median

    @property
    def rate(self) -> float:
        """Floating-point operations per second."""
        return self.product.flops / self.spread.median * 1000


def time_alone(products: Counter[Product], rounds: int, dtype: torch.dtype, device: torch.device) -> list[ProductTime]:
    """Times each kind of product alone; sorted by total time, longest first."""
    times = []
    for product, count in products.items():
        times.append(ProductTime(product, count, in_turns({"": product.alone(dtype, device)}, rounds, device)[""]))
    return sorted(times, key=lambda t: -t.total_ms)


class ProductsAlone:
    """Runs each product as often as it was counted, and nothing else, to be timed in turns with the counted code."""

    def __init__(self, products: Counter[Product], dtype: torch.dtype, device: torch.device) -> None:
        self.counts, self.device = products, device
        self.runs = {product: product.alone(dtype, device) for product in products}
        self.times: dict[Product, list[float]] = {product: [] for product in products}

    def measure(self) -> float:
        """Milliseconds of one pass over all of them; of each product, a first run is left out."""
        total = 0.0
        for product, run in self.runs.items():
            run()
            taken = milliseconds(lambda: [run() for _ in range(self.counts[product])], self.device)
            self.times[product].append(taken / self.counts[product])
            total += taken
        return total

    def slowest_first(self) -> list[ProductTime]:
        """Sorted by total time, longest first."""
        products = [ProductTime(p, self.counts[p], Spread.of(times)) for p, times in self.times.items()]
        return sorted(products, key=lambda t: -t.total_ms)


def print_products(times: list[ProductTime]) -> float:
    """Prints the table; returns how many GFLOP they are together."""
    for t in times[:SHOWN]:
        print(f"  {t.count:4} x {t.product!s:46} {t.spread.median:9.3f} ms {t.rate / 1e9:9.1f} GFLOP/s")
    if len(times) > SHOWN:
        print(f"  and {len(times) - SHOWN} smaller ones")
    return sum(t.count * t.product.flops for t in times) / 1e9


PARTS = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_grouped_mm"),
    "attention": ("aten::_scaled_dot_product", "flash"),
    "gather, scatter, top-k": ("aten::index", "aten::_index", "aten::scatter", "aten::gather", "aten::topk"),
    "norms": ("aten::native_layer_norm", "aten::linalg_vector_norm"),
    "copies, fills": ("aten::cat", "aten::copy_", "aten::fill_", "aten::zero_", "aten::repeat"),
    "sums": ("aten::sum", "aten::mean"),
}


def print_parts(run: Callable[[], object], label: str) -> None:
    """Prints the CPU time of one call by kind of operation (PyTorch's profiler, which slows it a little)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    parts: Counter[str] = Counter()
    for event in profiled.key_averages():
        kind = next((part for part, names in PARTS.items() if event.key.startswith(names)), None)
        kind = kind or ("element-wise" if event.key.startswith("aten::") else "autograd, Python")
        parts[kind] += event.self_cpu_time_total / 1000
    total = sum(parts.values())
    print(f"{label}: " + ", ".join(f"{part} {ms:.0f} ms ({100 * ms / total:.1f}%)" for part, ms in parts.most_common()))
