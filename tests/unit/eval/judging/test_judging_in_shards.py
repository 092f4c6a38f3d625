"""Shards are judged by processes of their own at the same time, and scored together."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eval import catalog, cli
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judging.run import JUDGES

pytestmark = pytest.mark.slow

CONFIG = EvalConfig(prompts_per_task=2, seeds=(0, 1), image_size_px=8)


def quiet(_):
    pass


def sampled(folder, first=0):
    def sampler(prompts, seeds, height, width):
        return [
            Image.fromarray(np.random.default_rng(first + s).integers(0, 256, (height, width, 3), dtype=np.uint8))
            for s in seeds
        ]

    generate(sampler, catalog.prompts(CONFIG), CONFIG, folder, log=quiet)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sampled(tmp_path_factory.mktemp("run"))


def judge(run, out, shard="0/1"):
    assert cli.main(["judge", str(run), "--out", str(out), "--shard", shard]) == 0
    return out


def score(run, out, *judged):
    return cli.main(
        ["score", str(run), "--out", str(out), *(x for folder in judged for x in ("--judged", str(folder)))]
    )


def test_two_shards_of_parallel_processes_are_scored_as_one(run, tmp_path):
    whole = judge(run, tmp_path / "whole")
    commands = [
        [sys.executable, "-m", "eval.cli", "judge", str(run), "--shard", f"{i}/2", "--out", str(tmp_path / str(i))]
        for i in range(2)
    ]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert score(run, tmp_path / "a", whole) == 0
    for folders in ((tmp_path / "0", tmp_path / "1"), (tmp_path / "1", tmp_path / "0")):
        assert score(run, tmp_path / "b", *folders) == 0
        for name in ("scorecard.json", "scores.parquet"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_alone_is_not_scored(run, tmp_path, capsys):
    assert score(run, tmp_path / "out", judge(run, tmp_path / "0", "0/2")) == 2
    assert "judge the run first, with all shards" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scorecard.json").exists()


def test_folders_of_different_images_or_judges_are_refused_by_name(run, tmp_path, capsys):
    one = judge(run, tmp_path / "0", "0/2")
    other = judge(sampled(tmp_path / "other", first=10**6), tmp_path / "1", "1/2")
    assert score(run, tmp_path / "out", one, other) == 2
    assert f"{other} and {one} are answers about different images" in capsys.readouterr().err
    two = judge(run, tmp_path / "2", "1/2")
    record = json.loads((two / JUDGES).read_text())
    record["detector"]["revision"] = "0" * 64
    (two / JUDGES).write_text(json.dumps(record))
    assert score(run, tmp_path / "out", one, two) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: detector was judged by shapes-detector at ") and f"in {two} by" in error
    assert error.count("\n") == 1
