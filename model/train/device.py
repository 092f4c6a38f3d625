"""Makes torchtitan 0.3.0 run without an accelerator. model/train/__init__.py imports it first.

torchtitan chooses its device when `torchtitan.tools.utils` is imported, and chooses "cuda" if there is no accelerator. In
that case this module sets the device to "cpu", with a device module that has the functions which torchtitan calls and
torch.cpu lacks. With an accelerator it changes nothing. See docs/decisions/cpu.md.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from model.kernels.elementwise import keep_freed_memory

import torchtitan.tools.utils as titan_utils

# Timeout of collectives. It must exceed the time to compile the blocks, to read a large checkpoint, and to draw samples on
# rank 0, which may take longer than NCCL's default of 10 minutes.
PATIENCE = timedelta(minutes=30)
CPU_PEAK_FLOPS = 1e11  # nominal; only scales the "mfu" that torchtitan logs
# Excludes reductions in NVLink switches (NVLSTree: across nodes), as Megatron-LM's deterministic mode does.
DETERMINISTIC_NCCL = "^NVLS,NVLSTree"


def _cpu_memory_stats(device: object = None) -> dict[str, int]:
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"active_bytes.all.peak": peak_bytes, "reserved_bytes.all.peak": peak_bytes}


def _nothing(*_: object) -> None:
    return None


_CPU_MODULE = SimpleNamespace(
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    reset_peak_memory_stats=_nothing,
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_device_name=lambda device=None: "cpu",
    get_device_properties=lambda device=None: SimpleNamespace(
        total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ),
    memory_stats=_cpu_memory_stats,
)

if not torch.accelerator.is_available():
    assert "torchtitan.components.metrics" not in sys.modules, "import model.train.device before torchtitan"
    titan_utils.device_type, titan_utils.device_module = "cpu", _CPU_MODULE
    titan_utils.get_peak_flops = lambda device_name: CPU_PEAK_FLOPS  # the original runs lspci twice per trainer

DEVICE_TYPE: str = titan_utils.device_type


@contextlib.contextmanager
def training_session(deterministic: bool = False) -> Iterator[None]:
    """Opens a process group for one stage. On exit it restores all global settings, so that another stage can follow.

    `deterministic` restricts NCCL to algorithms that reduce in a fixed order, unless NCCL_ALGO is set. NCCL reads the
    environment when a group is created.

    Under torchrun (RANK and WORLD_SIZE are set) it joins that group; otherwise it creates a group with one rank, which
    needs no address, port or environment. The settings to restore include those that torchtitan changes: Python's garbage
    collector, multithreaded autograd, the global seed and deterministic algorithms.
    """
    environment = dict(os.environ)
    threads, collecting, rng_state = torch.get_num_threads(), gc.isenabled(), torch.get_rng_state()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    owns_group, ended = not dist.is_initialized(), False
    if DEVICE_TYPE == "cpu":
        keep_freed_memory()  # not restored: glibc cannot report its previous settings
    try:
        os.environ.setdefault("LOCAL_RANK", "0")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if owns_group:
            # Before the group is created, which would otherwise use device 0 on every rank.
            titan_utils.device_module.set_device(titan_utils.get_local_device())
            if deterministic and DEVICE_TYPE != "cpu":
                os.environ.setdefault("NCCL_ALGO", DETERMINISTIC_NCCL)
            backend = dist.Backend.default_device_backend_map.get(DEVICE_TYPE, "gloo")
            if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend, timeout=PATIENCE)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # torchtitan keeps a stack of device meshes per thread; backward must run in this thread to use it.
        with torch.autograd.set_multithreading_enabled(False):
            yield
        ended = True
    finally:
        # After an error, other ranks may wait for this one. Destroying an NCCL group would wait for them, but torch
        # elastic stops them only after this process exits.
        if owns_group and dist.is_initialized() and (ended or dist.get_world_size() == 1):
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        torch.set_rng_state(rng_state)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if collecting:
            gc.enable()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
