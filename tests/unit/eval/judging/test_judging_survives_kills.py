"""Judging that is killed twenty times, or done in shards, ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from killed import identities, kill_at_random
from PIL import Image

from eval import catalog
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judges.shapes_judge import ShapesDetector
from eval.judging.answers import JOURNAL, SEALED
from eval.judging.run import INDEX, JUDGES
from eval.scorecard import judge_run

CONFIG = EvalConfig(prompts_per_task=3, seeds=(0, 1), image_size_px=8, judge_batch_size=4)
MANY = CONFIG.model_copy(update={"prompts_per_task": 20, "judge_batch_size": 2})


def quiet(_):
    pass


def sampled(config, folder):
    """A run with different images, so that the judge is asked about each."""

    def sampler(prompts, seeds, height, width):
        return [Image.new("RGB", (width, height), (s % 256, s // 256 % 256, s // 65536 % 256)) for s in seeds]

    generate(sampler, catalog.prompts(config), config, folder, log=quiet)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sampled(CONFIG, tmp_path_factory.mktemp("run"))


class Listing(ShapesDetector):
    """Writes its questions to a file, and takes a few milliseconds for each batch."""

    def __init__(self, log, gate=None):
        self.log, self.gate = log, gate

    def selftest(self):
        pass

    def answer(self, requests):
        with open(self.log, "a") as file:
            file.write(f"{len(requests)}\n")
        if self.gate is not None:
            self.gate.pass_through()
            time.sleep(0.003)
        return super().answer(requests)


def files(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def sealed(folder):
    return {name: (folder / name).read_bytes() for name in (INDEX, JUDGES, SEALED)}


def asked(log):
    return sum(map(int, log.read_text().split())) if log.is_file() else 0


def journal(folder):
    """Whole lines."""
    data = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).is_file() else b""
    return data[: data.rfind(b"\n") + 1]


@pytest.mark.slow
def test_twenty_kills_lose_at_most_a_batch_each_and_end_in_the_same_bytes(tmp_path):
    run = sampled(MANY, tmp_path / "run")
    judge_run(run, tmp_path / "whole", {"detector": Listing(tmp_path / "once")}, MANY, log=quiet)
    log, folder, rng = tmp_path / "often", tmp_path / "killed", random.Random(2)
    assert asked(tmp_path / "once") >= 200  # each time at most five batches of two begin: every kill interrupts work

    def work(gate):
        judge_run(run, folder, {"detector": Listing(log, gate)}, MANY, log=quiet)

    before, written = b"", {}
    for _ in range(20):
        already = asked(log)
        kill_at_random(work, rng, batches=4)
        after = journal(folder)
        assert after.startswith(before)  # answers are appended, and never written again
        lost = asked(log) - already - (after.count(b"\n") - before.count(b"\n"))
        assert 0 <= lost <= MANY.judge_batch_size
        others = identities(path for path in files(folder) if path.name != JOURNAL) if folder.is_dir() else {}
        assert written.items() <= others.items()
        before, written = after, others
    assert before and not (folder / SEALED).exists()
    keys = [(row["image"], row["question"]) for row in map(json.loads, before.splitlines())]
    assert len(set(keys)) == len(keys)
    judge_run(run, folder, {"detector": Listing(log)}, MANY, log=quiet)
    assert sealed(folder) == sealed(tmp_path / "whole")
    assert written.items() <= identities(files(folder)).items()
    assert asked(log) <= asked(tmp_path / "once") + 20 * MANY.judge_batch_size


@pytest.mark.slow
@pytest.mark.parametrize("before_it", [True, False])
def test_a_kill_while_answers_are_sealed_loses_none(run, tmp_path, before_it):
    judge_run(run, tmp_path / "whole", {"detector": Listing(tmp_path / "once")}, CONFIG, log=quiet)

    def work():
        real = os.replace

        def replace(source, target):
            if Path(target).name != SEALED:
                return real(source, target)
            if not before_it:
                real(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        judge_run(run, tmp_path / "killed", {"detector": Listing(tmp_path / "twice")}, CONFIG, log=quiet)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    written = identities(files(tmp_path / "killed"))
    assert (tmp_path / "killed" / SEALED in written) is not before_it
    judge_run(run, tmp_path / "killed", {"detector": Listing(tmp_path / "twice")}, CONFIG, log=quiet)
    assert sealed(tmp_path / "killed") == sealed(tmp_path / "whole")
    assert asked(tmp_path / "twice") == asked(tmp_path / "once")
    written.pop(tmp_path / "killed" / JOURNAL)
    assert written.items() <= identities(files(tmp_path / "killed")).items()


@pytest.mark.parametrize("shards", [2, 5])
def test_any_number_of_shards_of_judging_gives_the_same_bytes_and_asks_nothing_twice(run, tmp_path, shards):
    judge_run(run, tmp_path / "whole", {"detector": Listing(tmp_path / "once")}, CONFIG, log=quiet)
    for shard in reversed(range(shards)):
        judge = {"detector": Listing(tmp_path / "parts")}
        judge_run(run, tmp_path / "judged", judge, CONFIG, shard=shard, shards=shards, log=quiet)
    assert sealed(tmp_path / "judged") == sealed(tmp_path / "whole")
    assert asked(tmp_path / "parts") == asked(tmp_path / "once")
