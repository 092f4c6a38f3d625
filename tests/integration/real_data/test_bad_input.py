"""Bad input ends in one clear message, and nothing half-written stays behind."""

from __future__ import annotations

import json
import resource
import subprocess

import pytest


def _message(done) -> str:
    """The output as one line; it must have no traceback."""
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    return " ".join(text.replace("│", " ").split())


def _nothing_left(home) -> bool:
    kinds = home.artifacts.iterdir() if home.artifacts.is_dir() else []
    return all((entry / "manifest.json").is_file() for kind in kinds for entry in kind.iterdir())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stages[0].stps=2", "train.stages[0].stps: unknown key; did you mean 'steps'"),
        ("train.stages[1].image_size_px=40", "train.stages[1].image_size_px=40 must be a multiple of 16"),
        ("train.stages[9].steps=2", "out of range"),
        ("train.optim.muon_lr=fast", "train.optim.muon_lr"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(new_home, override, expected):
    done = new_home.run("--recipe", "smoke", "--overrides", override)
    assert expected in _message(done)
    assert not new_home.artifacts.exists()


def test_the_error_of_an_unknown_recipe_lists_the_known_ones(new_home):
    assert "ablations/token_choice, nucleus_17b, smoke, tiny nor a file" in _message(new_home.run("--recipe", "tinny"))


def test_overrides_given_twice_are_both_read(new_home):
    done = new_home.run("--recipe", "smoke", "--overrides", "train.seed=fast", "--overrides", "merge.last_n=many")
    message = _message(done)
    assert "train.seed" in message and "merge.last_n" in message


@pytest.mark.parametrize("workflow", ["pretrain", "reproduce"])
def test_the_17b_recipe_asks_for_its_data_then_for_a_scorers_commit_then_for_its_ranks(new_home, workflow):
    for source, expected in (
        ([], "source.path='s3://YOUR-BUCKET/nucleus/raw' is a placeholder: give your own images by --source"),
        (["--source", "s3://images/raw"], "curation.scorers.watermark.revision is not set: give a commit"),
        (
            ["--source", "s3://images/raw", "--overrides", f"curation.scorers.watermark.revision={'a' * 40}"],
            "train.nproc_per_node=8 = 64, but the training task has 1 x 1 = 1 processes",
        ),
    ):
        message = _message(new_home.run("--recipe", "nucleus_17b", *source, workflow=workflow))
        assert expected in message and len(message) < 1500
    assert not new_home.artifacts.exists()


def test_an_empty_source_a_folder_of_texts_and_a_missing_one_have_different_errors(new_home, tmp_path):
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    (texts / "a.txt").write_text("no image")
    assert "is empty; give a folder of images" in _message(new_home.run("--recipe", "smoke", "--source", str(empty)))
    assert "does not exist" in _message(new_home.run("--recipe", "smoke", "--source", str(tmp_path / "gone")))
    assert "image" in _message(new_home.run("--recipe", "smoke", "--source", str(texts)))
    assert _nothing_left(new_home)


def test_a_full_disk_ends_in_one_message_and_keeps_nothing(new_home):
    disk = new_home.path / "nucleus"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        message = _message(new_home.run("--recipe", "smoke"))
        assert "disk" in message and "is full while making records" in message
        assert _nothing_left(new_home)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("workflow", ["reproduce", "pretrain"])
def test_help_answers_in_under_three_seconds(new_home, workflow):
    """Seconds of CPU: waiting for a busy core does not count."""
    new_home.run("--help", workflow=workflow)  # compiled files and the disk cache
    times = []
    for _ in range(3):
        begin = _children_cpu_s()
        done = new_home.run("--help", workflow=workflow)
        times.append(_children_cpu_s() - begin)
        assert done.returncode == 0 and "--recipe" in done.stdout and "--source" in done.stdout
    assert min(times) < 3.0, json.dumps(times)
