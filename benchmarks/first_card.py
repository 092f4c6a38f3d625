"""Checks and measures a GPU, in sections; about 10 minutes.

    python benchmarks/first_card.py [--out OUT] [--only SECTION ...]
    python benchmarks/first_card.py --toy        # every section at a toy size on a CPU, to test the script

Each section is a separate process with a time limit. A section writes each measurement to disk at once, so that neither
a crash nor a limit loses it; after each section OUT has

    results.json       status and numbers of every section
    results.md         the same as tables
    SECTION.log        the section's output

A section whose packages are missing is skipped by name: the script runs with PyTorch 2.11 and without torchtitan,
diffusers or pydantic. Tests and measurements never run at the same time.

Exit code 0 if no section failed or ran out of time, 1 otherwise, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SCRIPT = Path(__file__).resolve()  # command line of a section's process
NO_DEVICE = 2
PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "torchtitan", "diffusers", "pydantic", "pytest")
MODULES = ("model.layers.attention", "model.kernels.route", "model.kernels.combine", "model.layers.moe", "model.transformer",
           "model.optim", "model.config", "model.train.parallel.parallelize", "gpu_blocks")  # fmt: skip
KERNEL_TESTS = ("tests/unit/model/test_attention.py", "tests/unit/model/gpu/test_kernels.py")
TOY_BLOCK = ("--device cpu --width 64 --heads 4 --kv-heads 2 --experts 4 --hidden 48 --text 8 --text-dim 32 --rounds 2 "
             "--no-compile")  # fmt: skip


class Skip(Exception):
    """A section cannot run here; the message says why."""


class Report:
    """The results of a section so far, in a file."""

    def __init__(self, path: Path):
        self.path, self.values, self.failed = path, {}, False

    def add(self, **values: Any) -> None:
        self.values |= values
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.values, indent=1))
        temporary.replace(self.path)

    @contextlib.contextmanager
    def attempt(self, name: str):
        """A measurement of a section, which may fail without ending the section."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip()[:500]}"
            print(f"{name} fails: {text}", flush=True)
            self.failed = True
            self.add(**{name: {"error": text}})


def versions(report: Report, toy: bool) -> None:
    """Versions, the card, the modules that can be imported, and the backends that they choose."""
    import torch

    report.add(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    report.add(packages={name: importlib.util.find_spec(name) is not None for name in PACKAGES})
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        report.add(card=card.name, capability=f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count,
                   memory_gib=round(card.total_memory / 2**30, 1))  # fmt: skip
    imports = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
            imports[name] = "imported"
        except Exception as error:
            imports[name] = f"{type(error).__name__}: {error}"
        report.add(imports=imports)
    from model import kernels
    from model.layers import attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = attention._machine(device, None)
    backend, reason = attention.choose_backend("auto", machine, torch.bfloat16, 128)
    report.add(attention=backend, attention_reason=reason, kernels_lack=kernels.missing_requirements(),
               workspace=os.environ.get("CUBLAS_WORKSPACE_CONFIG"))  # fmt: skip


def _pytest(report: Report, *arguments: str) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    results = report.path.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    counts = {"passed": 0, "failed": [], "not_run": {}}
    if results.is_file():
        for case in ElementTree.parse(results).iter("testcase"):
            outcome = next(iter(child for child in case if child.tag in ("failure", "error", "skipped")), None)
            if outcome is None:
                counts["passed"] += 1
            elif outcome.tag == "skipped":
                reason = outcome.get("message", "")
                counts["not_run"][reason] = counts["not_run"].get(reason, 0) + 1
            else:
                message = (outcome.get("message") or "").strip().splitlines()
                counts["failed"].append(f"{case.get('name')}: {message[0] if message else ''}"[:300])
    report.add(exit_code=code, **counts)
    if code not in (0, 5):  # 5: nothing was selected
        raise RuntimeError(f"pytest ended with {code}: {len(counts['failed'])} tests failed")


def kernel_tests(report: Report, toy: bool) -> None:
    """The tests of the Triton kernels and of attention that are marked gpu."""
    if toy:
        return _pytest(report, KERNEL_TESTS[1], "-k", "test_swiglu and fp32 and cpu and shape0")
    return _pytest(report, "-m", "gpu", "--timeout=150" if _has("pytest_timeout") else "-q", *KERNEL_TESTS)


def training_tests(report: Report, toy: bool) -> None:
    """Training with the published recipe's settings, compared with fp32 on a CPU; one process with NCCL (gloo on a
    CPU)."""
    for package in ("torchtitan", "pydantic"):
        if not _has(package):
            raise Skip(f"{package} is not installed")
    try:
        importlib.import_module("model.train.parallel.parallelize")
    except ImportError as error:
        raise Skip(f"model.train cannot be imported with this PyTorch: {error}") from error
    if toy:
        return _pytest(report, "tests/unit/model/train/test_expert_parallel.py", "-k", "bits")
    return _pytest(report, "-m", "gpu", "tests/gpu")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# One product before deterministic algorithms are enabled, as encoding comes before training in a local run.
PRODUCT_FIRST = """
{first}
import torch
x = torch.ones(64, 64, device="{device}", dtype=torch.bfloat16)
x @ x
torch.use_deterministic_algorithms(True)
import os
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
x @ x
"""


def workspace_probe(report: Report, toy: bool) -> None:
    """Deterministic products after another one in the same process: with `import model` first, and without (then PyTorch
    is expected to refuse)."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    for name, first in (("with_model", "import model"), ("without_model", "")):
        code = PRODUCT_FIRST.format(first=first, device="cpu" if toy else "cuda")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        error = done.stderr.strip().splitlines()[-1][:300] if done.returncode else ""
        print(name, done.returncode, error, flush=True)
        report.add(**{name: {"exit_code": done.returncode, "error": error}})
    if report.values["with_model"]["exit_code"]:
        raise RuntimeError(report.values["with_model"]["error"])


def attention_probe(report: Report, toy: bool) -> None:
    """Each attention backend with a key mask, at 1024 px: error, equal bits in two runs, time with and without
    deterministic algorithms, and memory of compiled code."""
    import torch
    from measure import in_turns, spin_up

    from model.layers import attention

    device = torch.device("cpu" if toy else "cuda")
    B, S, T, N, K, H = (1, 16, 8, 4, 2, 16) if toy else (2, 4096, 512, 16, 4, 128)
    dtype = torch.float32 if toy else torch.bfloat16
    torch.manual_seed(0)
    shapes = (B, S, N, H), (B, S + T, K, H), (B, S + T, K, H)
    exact = [torch.randn(shape, device=device) for shape in shapes]
    tensors = [x.to(dtype).requires_grad_() for x in exact]
    mask = torch.ones(B, S + T, dtype=torch.bool, device=device)
    mask[:, S + T // 2 :] = False
    machine = attention._machine(device.type, None)
    backends = [name for name in ("sdpa", *attention.PACKAGES) if not attention.missing_requirements(name, machine)]
    report.add(backends=backends)
    truth = attention._sdpa(*[x.detach().float() for x in tensors], mask)
    for backend in backends:
        with report.attempt(backend):
            attention.use_attention(backend)
            prepared = attention.prepare_mask(mask, tensors[0].flatten(2), H)

            def forward(prepared=prepared):
                return attention.attend(*tensors, prepared)

            out = forward()
            grad = torch.ones_like(out)
            result = {"error": ((out.float() - truth).norm() / truth.norm()).item(), "ms": {}}

            def backward(out=out, grad=grad):
                return torch.autograd.grad(out, tensors, grad, retain_graph=True)

            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                spin_up(device, 0.3)
                times = in_turns({"forward": forward, "backward": backward}, 3, device)
                name = "deterministic" if deterministic else "any order"
                result["ms"] |= {f"{kind}, {name}": spread.median for kind, spread in times.items()}
                if deterministic:
                    result["same_bits_twice"] = all(map(torch.equal, backward(), backward()))
            if not toy:
                result |= _compiled_attention(torch, attention, tensors, prepared)
            torch.use_deterministic_algorithms(False)
            print(backend, result, flush=True)
            report.add(**{backend: result})
    torch.use_deterministic_algorithms(False)
    attention.use_attention("auto")


def _compiled_attention(torch: Any, attention: Any, tensors: list, prepared: Any) -> dict[str, float]:
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v, mask: attention.attend(q, k, v, mask).sum(), fullgraph=True)
    result = {}
    for name, run in (("eager", lambda q, k, v, mask: attention.attend(q, k, v, mask).sum()), ("compiled", compiled)):
        run(*tensors, prepared).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*tensors, prepared).backward()
        torch.cuda.synchronize()
        result[f"peak_mib_{name}"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return result


def expert_products(report: Report, toy: bool) -> None:
    """An expert's products at 128 to 4096 rows, forward and gradients, batched and grouped, compared with the card's
    matrix rate on a large product in the same process. Training has 512 rows (1024 px) and 1024 (256 px)."""
    import torch
    from measure import in_turns, spin_up

    device = torch.device("cpu" if toy else "cuda")
    dtype = torch.float32 if toy else torch.bfloat16
    E, D, F, side, rows_of = (
        (2, 16, 12, 64, (8, 16)) if toy else (64, 2048, 2688, 8192, (128, 256, 512, 1024, 2048, 4096))
    )
    square = torch.randn(side, side, device=device, dtype=dtype)
    spin_up(device)
    large = in_turns({"": lambda: square @ square}, 5, device)[""]
    rate = 2 * side**3 / large.median * 1000
    report.add(matrix_tflops=rate / 1e12, rows={})
    weight = torch.randn(E, D, F, device=device, dtype=dtype)
    for rows in rows_of:
        x, g = torch.randn(E, rows, D, device=device, dtype=dtype), torch.randn(E, rows, F, device=device, dtype=dtype)
        runs = {
            "bmm forward": lambda x=x: torch.bmm(x, weight),
            "bmm dX": lambda g=g: torch.bmm(g, weight.mT),
            "bmm dW": lambda x=x, g=g: torch.bmm(x.mT, g),
        }
        grouped = getattr(torch, "_grouped_mm", None)
        if grouped is not None and not toy:
            ends = torch.arange(rows, E * rows + 1, rows, device=device, dtype=torch.int32)
            flat_x, flat_g = x.view(-1, D), g.view(-1, F)
            runs |= {
                "grouped forward": lambda x=flat_x, ends=ends: grouped(x, weight, offs=ends),
                "grouped dX": lambda g=flat_g, ends=ends: grouped(g, weight.mT, offs=ends),
                "grouped dW": lambda x=flat_x, g=flat_g, ends=ends: grouped(x.T, g, offs=ends),
            }
        shares = {}
        for name, run in runs.items():
            with report.attempt(f"{name}, {rows} rows"):
                spin_up(device, 0.1)
                spread = in_turns({"": run}, 5, device)[""]
                shares[name] = 2 * E * rows * D * F / spread.median * 1000 / rate
        report.add(rows=report.values["rows"] | {str(rows): shares})
        print(rows, {name: f"{share:.2f}" for name, share in shares.items()}, flush=True)


def _block(report: Report, toy: bool, case: str) -> None:
    import gpu_blocks

    options = f"{TOY_BLOCK} --cases 1x16x2" if toy else f"--rounds 5 --cases {case}"
    args = gpu_blocks.parse(options.split())
    rate, bandwidth = gpu_blocks.rates(args)
    report.add(matrix_tflops=rate / 1e12, bandwidth_gb_s=bandwidth / 1e9, diffusers=gpu_blocks.has_diffusers())
    report.add(**gpu_blocks.measure(args, args.cases[0], rate, bandwidth, keep=report.add))
    if report.values["failures"]:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in report.values["failures"].items()))


def block_1024px(report: Report, toy: bool) -> None:
    """A whole block at a micro-batch of the last stage: 4 samples of 4096 tokens, capacity factor 2."""
    _block(report, toy, "4x4096x2")


def block_256px(report: Report, toy: bool) -> None:
    """A whole block at a micro-batch of the first stage: 32 samples of 256 tokens, capacity factor 8."""
    _block(report, toy, "32x256x8")


def muon_and_profile(report: Report, toy: bool) -> None:
    """Newton-Schulz of 192 expert matrices, and the time of each Triton kernel of routing and combining."""
    import torch
    from measure import in_turns, spin_up
    from torch.profiler import ProfilerActivity, profile

    from model import kernels
    from model.layers.moe import MoE
    from model.optim import newton_schulz

    device = torch.device("cpu" if toy else "cuda")
    count, m, n = (2, 8, 12) if toy else (192, 1344, 2048)
    with report.attempt("newton_schulz"):
        matrices = torch.randn(count, m, n, device=device)
        spin_up(device, 0.3)
        spread = in_turns({"": lambda: newton_schulz(matrices)}, 2, device, warm_up=1)[""]
        flops = 5 * count * (4 * m * m * n + 2 * m**3)
        report.add(newton_schulz={"matrices": count, "ms": spread.median, "tflops": flops / spread.median / 1e9})
    with report.attempt("kernels"):
        B, S, D, F, E = (2, 4, 16, 8, 4) if toy else (4, 4096, 2048, 1344, 64)
        kernels.use_kernels("triton")  # an error names the missing package
        moe = MoE(D, F, E, 2.0).to(device, torch.float32 if toy else torch.bfloat16)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=D**-0.5)
        x, time_BD = (torch.randn(*size, device=device, dtype=moe.gate.weight.dtype) for size in ((B, S, D), (B, D)))
        x.requires_grad_()
        activities = [ProfilerActivity.CPU] + ([] if toy else [ProfilerActivity.CUDA])
        moe(x, x, time_BD)[0].sum().backward()
        with profile(activities=activities) as profiled:
            moe(x, x, time_BD)[0].sum().backward()
        field = "self_cpu_time_total" if toy else "self_device_time_total"
        times = {event.key[:80]: getattr(event, field) / 1000 for event in profiled.key_averages()}
        times = dict(sorted(times.items(), key=lambda item: -item[1])[:25])
        report.add(kernels_ms=times)
        for name, ms in times.items():
            print(f"  {ms:9.4f} ms  {name}")


class Section(NamedTuple):
    run: Callable[[Report, bool], None]
    limit_s: float


SECTIONS = {
    "versions": Section(versions, 60),
    "workspace_probe": Section(workspace_probe, 45),
    "attention_probe": Section(attention_probe, 60),
    "kernel_tests": Section(kernel_tests, 150),
    "expert_products": Section(expert_products, 45),
    "block_1024px": Section(block_1024px, 120),
    "block_256px": Section(block_256px, 100),
    "muon_and_profile": Section(muon_and_profile, 30),
    "training_tests": Section(training_tests, 240),
}


def run_section(name: str, out: Path, toy: bool) -> int:
    """Runs one section, in its own process."""
    report = Report(out / f"{name}.json")
    report.add()
    try:
        SECTIONS[name].run(report, toy)
    except Skip as reason:
        print(f"skipped: {reason}")
        report.add(skip_reason=str(reason))
    return int(report.failed)


def start_section(name: str, out: Path, toy: bool, limit_s: float) -> dict[str, Any]:
    """Runs a section in a separate process, and ends that process and its children at the limit."""
    command = [sys.executable, str(SCRIPT), "--section", name, "--out", str(out), *(["--toy"] if toy else [])]
    # Triton reads TRITON_INTERPRET when it is first imported.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": str(int(toy))}
    begin = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            status = "failed" if code else "ok"
        except subprocess.TimeoutExpired:
            status, code = "timed out", None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    path = out / f"{name}.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    if status == "ok" and "skip_reason" in values:
        status = f"skipped: {values.pop('skip_reason')}"
    result = {"status": status, "seconds": round(time.monotonic() - begin, 1), "limit_s": limit_s, "values": values}
    if status != "ok" and not status.startswith("skipped"):
        lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        result |= {"exit_code": code, "last_lines": lines[-15:]}
    return result


def flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Numbers and texts of nested values, by dotted names."""
    if isinstance(values, dict):
        return [
            row for key, value in values.items() for row in flat(value, f"{prefix}{key}: " if value else prefix + key)
        ]
    text = f"{values:.4g}" if isinstance(values, float) else str(values)
    return [(prefix.removesuffix(": "), text.replace("|", "/").replace("\n", " "))]


def markdown(results: dict[str, Any]) -> str:
    lines = ["| section | status | seconds | limit |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {r['status']} | {r['seconds']} | {r['limit_s']:g} |" for name, r in results.items()]
    for name, result in results.items():
        lines += ["", f"## {name}", "", SECTIONS[name].run.__doc__.strip().replace("\n    ", " "), ""]
        rows = flat(result["values"]) if result["values"] else []
        if rows:
            lines += ["| what | value |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)]
        if result.get("last_lines"):
            lines += ["", "```", *result["last_lines"], "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("first_card"))
    parser.add_argument("--toy", action="store_true", help="every section at a toy size, on a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--limit", type=float, help="seconds for each section, in place of its own limit")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.section:
        return run_section(args.section, out, args.toy)
    if not args.toy:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here: nothing measured (--toy runs the script itself on a CPU)")
            return NO_DEVICE
    results: dict[str, Any] = {}
    for name in args.only:
        results[name] = start_section(name, out, args.toy, args.limit or SECTIONS[name].limit_s)
        print(f"{name}: {results[name]['status']}, {results[name]['seconds']} s", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(markdown(results))
    print(f"results in {out}/results.md and results.json")
    return int(any(result["status"] in ("failed", "timed out") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
