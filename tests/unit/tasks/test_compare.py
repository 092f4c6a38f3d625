"""Comparing recipes over training seeds: how runs are grouped, and the report of their differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.compare import Variant, compare, draw, losses_before_guidance, main, read_run, render, variants
from tasks.manifest import seal


def sealed(path: Path, kind: str, parents=(), config=None, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in {"data__txt": path.name, **files}.items():
        (path / name.replace("__", ".")).write_text(text)
    seal(path, kind, list(parents), config)
    return path


@pytest.fixture
def trained(tmp_path):
    """Makes the lineage of a training of two stages, and returns its scorecard."""
    latents = [sealed(tmp_path / f"latents{i}", "latents") for i in (1, 2)]

    def make(
        name: str,
        seed: int,
        overall: float,
        loss: float,
        guidance: float = 3.0,
        nproc: int = 1,
        judge: str = "a",
        guided_steps: int = 0,
        **optim,
    ) -> Path:
        home, stages = tmp_path / name, []
        for i, data in enumerate(latents):
            config = {
                "model": {}, "stage": {"name": f"stage{i}", "steps": 100, "guidance": {"steps": guided_steps}}, "seed": seed + 1000 * i,
                "train": {"seed": seed, "keep_checkpoints": nproc, "optim": {"matrices": "muon", "lr": 0.01, **optim}},
            }  # fmt: skip
            lines = "\n".join(json.dumps({"step": step, "loss": loss + (step <= 80)}) for step in range(0, 101, 10))
            stages.append(
                sealed(
                    home / f"stage{i}", "checkpoints", [data, *stages[-1:]], config,
                    metrics__jsonl=lines,
                )
            )  # fmt: skip
        merged = sealed(home / "merged", "merged", stages[-1:], {"merge": {"last_n": 8}, "model": {"layers": 6}})
        images = sealed(home / "images", "images", [merged])
        card = {
            "overall": {"mean": overall}, "tasks": {"counting": {"mean": overall / 2}}, "held_out": None,
            "config": {"guidance_scale": guidance}, "name": f"geneval[{judge}]", "version": "1",
            "settings": {"prompt_set_sha256": "0" * 64, "judges": [{"role": "vqa", "name": judge, "revision": "r" * 64}]},
        }  # fmt: skip
        return sealed(home / "card", "scorecard", [images], scorecard__json=json.dumps(card))

    return make


def test_runs_that_differ_only_in_their_seed_are_one_variant(trained):
    cards = [
        trained("a0", 0, 0.90, 0.10), trained("b0", 0, 0.80, 0.20, lr=0.003, matrices="adamw"),
        trained("a1", 1, 0.94, 0.14, nproc=2), trained("b1", 1, 0.88, 0.20, lr=0.003, matrices="adamw"),
        trained("b2", 2, 0.60, 0.26, lr=0.003, matrices="adamw"),
    ]  # fmt: skip
    results = variants([read_run(card) for card in cards])
    assert [(v.name, sorted(v.runs)) for v in results] == [
        ("lr=0.01, matrices=muon", [0, 1]), ("lr=0.003, matrices=adamw", [0, 1, 2])
    ]  # fmt: skip
    result = compare(results)
    muon, adamw = result["variants"].values()
    assert muon["overall"]["mean"] == pytest.approx(0.92) and muon["overall"]["std"] == pytest.approx(0.02 * 2**0.5)
    assert adamw["counting"]["mean"] == pytest.approx(0.38)
    assert adamw["final_loss"]["mean"] == pytest.approx(0.22)  # of the last tenth of the steps
    (difference,) = result["differences"].values()  # of seeds 0 and 1, which both have
    assert difference["overall"]["values"] == pytest.approx([-0.10, -0.06])
    assert difference["overall"]["std"] == pytest.approx(0.04 / 2**0.5)
    # two training seeds give wide intervals: Student's quantile for one degree of freedom is 12.7
    low, high = difference["overall"]["interval"]
    assert (low, high) == pytest.approx((-0.08 - 12.706 * 0.02, -0.08 + 12.706 * 0.02), abs=1e-3)
    assert difference["overall"]["verdict"] == "cannot tell"


def test_the_loss_of_steps_with_guidance_is_not_compared(trained, tmp_path):
    lines = [{"step": step, "loss": step / 100} for step in (50, 60, 80, 100)]
    assert losses_before_guidance(lines, {"steps": 100, "guidance": None}) == [
        (50, 0.5),
        (60, 0.6),
        (80, 0.8),
        (100, 1.0),
    ]
    assert losses_before_guidance(lines, {"steps": 100, "guidance": {"steps": 40}}) == [(50, 0.5), (60, 0.6)]
    # Guidance over the last 30 steps, without which the loss is higher by 1 (`trained`); then over all of them.
    some, none = (read_run(trained(name, 0, 0.9, 0.1, guided_steps=n)) for name, n in (("some", 30), ("all", 101)))
    assert some.final_loss == pytest.approx(1.1)
    plain = read_run(trained("plain", 0, 0.9, 0.1))
    for other, compared in ((plain, True), (some, False)):  # only losses of the same steps have a difference
        (difference,) = compare([Variant("base", {0: plain}), Variant("x", {0: other})])["differences"].values()
        assert ("final_loss" in difference) == compared
    compared = variants([none])
    assert "final_loss" not in compare(compared)["variants"]["all runs"]
    draw(compared, tmp_path / "no_losses.png")


def test_a_difference_that_all_training_seeds_agree_on_is_one(trained):
    cards = [trained(f"a{i}", i, 0.90 + 0.001 * i, 0.1) for i in range(4)]
    cards += [trained(f"b{i}", i, 0.80 + 0.002 * i, 0.1, lr=0.003) for i in range(4)]
    result = compare(variants([read_run(card) for card in cards]))
    (difference,) = result["differences"].values()
    assert difference["overall"]["verdict"] == "lower"
    assert "lr=0.003: geneval[a] overall lower, 95% interval over 4 training seeds" in render(result)


def test_the_command_prints_the_table_and_draws_it(trained, tmp_path, capsys):
    cards = [trained("a0", 0, 0.9, 0.1), trained("b0", 0, 0.8, 0.2, lr=0.003)]
    assert main([*map(str, cards), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (
        "| lr=0.01, 1 | 0.900 | 0.450 | 0.100 |" in printed and "| lr=0.003, 1 | -0.100 | -0.050 | +0.100 |" in printed
    )
    assert render(json.loads((tmp_path / "out" / "comparison.json").read_text())) == printed.strip()
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("second, message", [
    (dict(seed=0, overall=0.9, loss=0.1), "both have train.seed=0 and all runs"),
    (dict(seed=1, overall=0.9, loss=0.1, guidance=4.0), "eval.guidance_scale is 3.0 and 4.0"),
    (dict(seed=1, overall=0.9, loss=0.1, judge="b"), "eval.judge_vqa is a at rrrrrrrrrrrr and b at rrrrrrrrrrrr"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(trained, capsys, second, message):
    cards = [trained("a", 0, 0.9, 0.1), trained("b", **second)]
    assert main([str(card) for card in cards]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_another_artifact_is_refused(trained, capsys):
    merged = trained("a", 0, 0.9, 0.1).parent / "merged"
    assert main([str(merged)]) == 2
    assert f"{merged} is a merged, not a scorecard" in capsys.readouterr().err
