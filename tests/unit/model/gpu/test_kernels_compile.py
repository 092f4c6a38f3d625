"""Every Triton kernel compiles for Hopper, on a machine without a device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE_ALL = """
import importlib, re, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
P16, P32, I32, I64, i, f = "*bf16", "*fp32", "*i32", "*i64", "i32", "fp32"
cases = {
    "swiglu._swiglu_forward": ([P16, P16, i, i, i], dict(BLOCK=512)),
    "swiglu._swiglu_backward": ([P16, P16, P16, i, i, i], dict(BLOCK=512)),
    "norm_rope._norm_rope_forward": ([P16, P16, P32, P16] + [i] * 7 + [f], dict(BLOCK_N=32, BLOCK_H=128)),
    "norm_rope._norm_rope_backward": ([P16, P16, P32, P16, P16, P32] + [i] * 8 + [f], dict(BLOCK_N=32, BLOCK_H=128)),
    "norm_modulate._norm_modulate_forward": ([P16, P16, P16, P16, i, i, i, f], dict(NORMED=True, BLOCK=2048)),
    "norm_modulate._norm_modulate_backward": (
        [P16, P16, P16, P16, P16, P32, i, i, i, f], dict(CHUNK=16, NORMED=True, BLOCK=2048)
    ),
    "route._scores": ([P16, P16, P16, i, i, i], dict(SIGMOID=False, BLOCK_T=32, BLOCK_E=64)),
    "route._select": ([P16, I64, I64, I32, i, i, i, i], dict(HIGH=31, LOW=16, BLOCK_S=4096)),
    "route._normalise": ([P16, I32, P16, I32, I32, i, i, f], dict(BLOCK_T=32, BLOCK_E=64)),
    "route._route_backward": (
        [P16, I32, P16, P16, P16, i, i, f],
        dict(SIGMOID=False, SCORES_USED=True, GATES_USED=True, BLOCK_T=32, BLOCK_E=64),
    ),
    "combine._sum_takers": ([P16, I32, I32, P16, P16, P16, i, i], dict(BASE=True, GATED=True, BLOCK=1024)),
    "combine._combine_backward": ([P16, P16, P16, I64, P16, P16, i], dict(BLOCK=2048)),
}
jitted = set()
for module in ("swiglu", "norm_rope", "norm_modulate", "route", "combine"):
    for name, value in vars(importlib.import_module("model.kernels." + module)).items():
        if isinstance(value, triton.runtime.JITFunction):
            jitted.add(module + "." + name)
helpers = {"route._score", "norm_modulate._normalise_row", "norm_modulate._one_plus"}
assert jitted == set(cases) | helpers, jitted ^ set(cases)
for name, (types, constants) in cases.items():
    module, function = name.split(".")
    kernel = getattr(importlib.import_module("model.kernels." + module), function)
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(types), name
    source = ASTSource(kernel, dict(zip(names, types)) | {c: "constexpr" for c in constants}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"], name
    print(name, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_the_released_shapes_on_hopper(tmp_path):
    """Needs no device: Triton includes its compiler. The interpreter accepts code that the compiler may refuse."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE_ALL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
