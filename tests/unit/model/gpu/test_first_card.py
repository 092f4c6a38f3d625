"""benchmarks/first_card.py: every section at a toy size, and the output of a section that fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "benchmarks"))

import first_card  # noqa: E402
import gpu_blocks  # noqa: E402

from model import kernels  # noqa: E402
from model.layers import attention  # noqa: E402

STARTS_PROCESSES = ("workspace_probe", "kernel_tests", "training_tests")


@pytest.fixture(autouse=True)
def put_back():
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    kernels.use_kernels("auto")
    attention.use_attention("auto")
    assert not torch.are_deterministic_algorithms_enabled()


def run(name: str, tmp_path: Path) -> dict:
    report = first_card.Report(tmp_path / f"{name}.json")
    first_card.SECTIONS[name].run(report, toy=True)
    assert not report.failed
    assert json.loads(report.path.read_text()) == json.loads(json.dumps(report.values))
    return report.values


def test_versions_name_what_can_be_imported(tmp_path):
    result = run("versions", tmp_path)
    assert set(result["imports"].values()) == {"imported"}
    assert result["torch"] == torch.__version__ and result["workspace"] == ":4096:8"


def test_every_backend_of_attention_is_probed(tmp_path):
    result = run("attention_probe", tmp_path)
    assert result["backends"] == ["sdpa"] and result["sdpa"]["error"] < 1e-5 and result["sdpa"]["same_bits_twice"]
    assert {"forward, deterministic", "backward, any order"} <= set(result["sdpa"]["ms"])


def test_expert_products_are_shares_of_the_rate_of_a_large_product(tmp_path):
    result = run("expert_products", tmp_path)
    assert result["matrix_tflops"] > 0
    assert all(set(shares) == {"bmm forward", "bmm dX", "bmm dW"} for shares in result["rows"].values())


@pytest.mark.parametrize("name", ["block_1024px", "block_256px"])
def test_a_block_is_measured(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_blocks, "has_kernels", lambda args: False)  # the interpreter takes seconds
    result = run(name, tmp_path)
    assert result["failures"] == {} and result["products"]["forward + backward"]["experts_share_of_matrix_rate"] > 0
    assert set(result["attention"]) == {"attention forward", "attention backward"}


def test_a_block_keeps_what_was_measured_before_compiling_took_too_long(tmp_path, monkeypatch):
    def stuck():
        raise KeyboardInterrupt

    real = gpu_blocks.variants
    monkeypatch.setattr(gpu_blocks, "has_kernels", lambda args: False)
    monkeypatch.setattr(gpu_blocks, "variants", lambda *a: real(*a) | {"ours, compiled, torch": stuck})
    with pytest.raises(KeyboardInterrupt):
        run("block_1024px", tmp_path)
    result = json.loads((tmp_path / "block_1024px.json").read_text())
    assert set(result["ms"]["forward + backward"]) == {"ours, torch", "diffusers, eager"}
    assert result["speed"] and result["products"]["forward"] and result["attention"] and result["steps"]


@pytest.mark.slow
def test_toy_sections_have_tritons_interpreter_from_the_start(tmp_path, monkeypatch):
    """Triton reads the variable when it is first imported, which other packages may do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert first_card.start_section("muon_and_profile", tmp_path, True, 300)["status"] == "ok"


@pytest.mark.skipif(not kernels.interpreted(), reason="needs TRITON_INTERPRET=1, set before Triton is imported")
@pytest.mark.slow
def test_newton_schulz_is_timed_and_kernels_are_profiled(tmp_path):
    result = run("muon_and_profile", tmp_path)
    assert result["newton_schulz"]["ms"] > 0
    assert {"nucleus::route", "nucleus::combine_rows"} <= set(result["kernels_ms"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS_PROCESSES)
def test_sections_that_start_processes_of_their_own(name, tmp_path):
    result = run(name, tmp_path)
    if name == "workspace_probe":
        assert result["with_model"]["exit_code"] == 0
    else:
        assert result["passed"] >= 1 and not result["failed"]


def test_every_section_has_a_test_here():
    tested = {"versions", "attention_probe", "expert_products", "block_1024px", "block_256px", "muon_and_profile"}
    assert tested | set(STARTS_PROCESSES) == set(first_card.SECTIONS)
    assert sum(section.limit_s for section in first_card.SECTIONS.values()) < 900


SCRIPT = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
import first_card

def good(report, toy):
    'Measures.'
    report.add(speed=1.5, nested=dict(a=2))

def crash(report, toy):
    'Ends without a word.'
    report.add(so_far=3)
    os._exit(9)

def slow(report, toy):
    'Takes too long.'
    report.add(so_far=4)
    if os.fork() == 0:
        Path({out!r}, 'child').write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)

def error(report, toy):
    'Fails in one part.'
    with report.attempt('first'):
        raise RuntimeError('out of\\nmemory | here')
    report.add(second=5)

def missing(report, toy):
    'Needs something.'
    raise first_card.Skip('torchtitan is not installed')

first_card.SCRIPT = Path(__file__).resolve()
first_card.SECTIONS = dict((run.__name__, first_card.Section(run, 20)) for run in (good, crash, slow, error, missing))
first_card.SECTIONS['slow'] = first_card.Section(slow, {limit})
sys.exit(first_card.main())
"""


@pytest.mark.slow
def test_a_section_that_fails_or_takes_too_long_stops_no_other_and_loses_nothing(tmp_path):
    import subprocess

    out, script = tmp_path / "out", tmp_path / "card.py"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), out=str(out), limit=5))
    done = subprocess.run(
        [sys.executable, str(script), "--toy", "--out", str(out)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert {name: result["status"] for name, result in results.items()} == {
        "good": "ok", "crash": "failed", "slow": "timed out", "error": "failed",
        "missing": "skipped: torchtitan is not installed",
    }  # fmt: skip
    assert results["good"]["values"] == {"speed": 1.5, "nested": {"a": 2}}
    assert results["crash"]["values"] == {"so_far": 3} and results["crash"]["exit_code"] == 9
    assert results["slow"]["values"] == {"so_far": 4}
    assert results["error"]["values"]["second"] == 5 and "out of" in results["error"]["values"]["first"]["error"]
    table = (out / "results.md").read_text()
    for line in ("| slow | timed out |", "| nested: a | 2 |", "| so_far | 3 |", "memory / here |"):
        assert line in table, table
    child = int((out / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]


def test_without_a_device_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_card.main(["--out", str(tmp_path)]) == first_card.NO_DEVICE == 2
    assert capsys.readouterr().out.count("\n") == 1
