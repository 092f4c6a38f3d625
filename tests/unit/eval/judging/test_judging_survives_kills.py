"""Judging that is killed twenty times ends in the bytes of judging that was not, and so does judging in shards."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import pytest
from PIL import Image

from eval import catalog
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judges.shapes_judge import ShapesDetector
from eval.judging.answers import SEALED
from eval.judging.run import INDEX
from eval.scorecard import judge_run

CONFIG = EvalConfig(prompts_per_task=3, seeds=(0, 1), image_size_px=8, judge_batch_size=4)


def quiet(_):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose images all differ, so that each is asked about."""
    folder = tmp_path_factory.mktemp("run")

    def sampler(prompts, seeds, height, width):
        return [Image.new("RGB", (width, height), (s % 256, s // 256 % 256, s // 65536 % 256)) for s in seeds]

    generate(sampler, catalog.prompts(CONFIG), CONFIG, folder, log=quiet)
    return folder


class Killed(ShapesDetector):
    """Dies before or after its n-th batch; writes down how much it was asked."""

    def __init__(self, log, batches=10**9, before=True):
        self.log, self.left, self.before = log, batches, before

    def selftest(self):
        pass

    def answer(self, requests):
        self.left -= 1
        if self.left < 0 and self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.log, "a") as file:
            file.write(f"{len(requests)}\n")
        answers = super().answer(requests)
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers


def sealed(folder):
    return {name: (folder / name).read_bytes() for name in (INDEX, SEALED)}


def asked(log):
    return sum(map(int, log.read_text().split()))


@pytest.mark.slow
def test_twenty_kills_lose_at_most_a_batch_each_and_end_in_the_same_bytes(run, tmp_path):
    judge_run(run, tmp_path / "whole", {"detector": Killed(tmp_path / "once")}, CONFIG, log=quiet)
    rng, kills = random.Random(2), 0
    for _ in range(20):
        judge = Killed(tmp_path / "often", rng.randint(0, 2), rng.random() < 0.5)
        child = multiprocessing.get_context("fork").Process(
            target=judge_run, args=(run, tmp_path / "killed", {"detector": judge}, CONFIG), kwargs={"log": quiet}
        )
        child.start()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 8  # the later children find everything answered
    judge_run(run, tmp_path / "killed", {"detector": Killed(tmp_path / "often")}, CONFIG, log=quiet)
    assert sealed(tmp_path / "killed") == sealed(tmp_path / "whole")
    assert asked(tmp_path / "often") <= asked(tmp_path / "once") + kills * CONFIG.judge_batch_size


@pytest.mark.parametrize("shards", [2, 5])
def test_any_number_of_shards_of_judging_gives_the_same_bytes_and_asks_nothing_twice(run, tmp_path, shards):
    judge_run(run, tmp_path / "whole", {"detector": Killed(tmp_path / "once")}, CONFIG, log=quiet)
    for shard in reversed(range(shards)):
        judge = {"detector": Killed(tmp_path / "parts")}
        judge_run(run, tmp_path / "judged", judge, CONFIG, shard=shard, shards=shards, log=quiet)
    assert sealed(tmp_path / "judged") == sealed(tmp_path / "whole")
    assert asked(tmp_path / "parts") == asked(tmp_path / "once")
