"""A recipe file of somebody else stays bounded, reads no other files and runs no code (findings F21 and F23)."""

from __future__ import annotations

import time

import pytest
import yaml

from eval import cli
from model.config import INIT_FROM
from tasks.encoding.config import HubComponent
from tasks.recipe import RECIPES, load_recipe

COMMIT = "0" * 40
BOMBS = {
    "lists": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{c}: &{c} {{<<: [{', '.join(['*' + p] * 9)}]}}\n" for p, c in zip("abcdefgh", "bcdefghi")),
    "inside itself": "a: &a [1, *a]\n",
    "deep": "a: " + "[" * 100_000 + "]" * 100_000,
    "many": "a: [" + "1," * 101_000 + "1]",
    "large": "# " + "x" * (1 << 20),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_yaml_bomb_is_refused_at_once(tmp_path, bomb):
    (tmp_path / "bomb.yaml").write_text(BOMBS[bomb])
    began = time.process_time()
    with pytest.raises(ValueError, match="more than|contains it|too deeply|it is not a recipe"):
        load_recipe(str(tmp_path / "bomb.yaml"))
    assert time.process_time() - began < 5  # unbounded, minutes or all memory


@pytest.mark.slow
def test_an_override_that_is_nested_too_deeply_is_refused():
    with pytest.raises(ValueError, match="nested too deeply"):
        load_recipe("tiny", ["source=" + "[" * 100_000 + "]" * 100_000])


def test_plain_aliases_are_still_read(tmp_path):
    text = (RECIPES / "smoke.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("_unused: &x [1, 2]\n" + text)
    with pytest.raises(ValueError, match="_unused: unknown key"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_fifo_is_not_opened_as_a_recipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="nor a file"):
        load_recipe(str(tmp_path / "pipe.yaml"))


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../b", "a/..", "/a", "a//b", ".", "./a", ".git", "a/"])
def test_a_subfolder_of_a_repository_does_not_climb(subfolder):
    assert not INIT_FROM.fullmatch(f"owner/name/{subfolder}@{COMMIT}")
    with pytest.raises(ValueError):
        load_recipe("tiny", [f"train.init_from=owner/name/{subfolder}@{COMMIT}"])
    with pytest.raises(ValueError):
        HubComponent(repo_id="owner/name", revision=COMMIT, subfolder=subfolder)


def test_a_plain_subfolder_is_accepted():
    for subfolder in ("transformer", "a/b-1.2/c_d"):
        assert INIT_FROM.fullmatch(f"owner/name/{subfolder}@{COMMIT}")
        assert HubComponent(repo_id="owner/name", revision=COMMIT, subfolder=subfolder)


CODE = [
    ("benchmark", "planted_module:BENCHMARK"),
    ("further_benchmarks", ["planted_module:BENCHMARK"]),
    ("judges", {"detector": "os:system@touch {}"}),
    ("judges", {"detector": "planted_module:make"}),
    ("judges", {"reasoning": f"llm2clip@{COMMIT}"}),
]


@pytest.mark.parametrize(("key", "value"), CODE)
def test_a_recipe_file_cannot_name_code_to_import(tmp_path, monkeypatch, key, value):
    marker = tmp_path / "marker"
    (tmp_path / "planted_module.py").write_text(f"open({str(marker)!r}, 'w')\nBENCHMARK = make = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = yaml.safe_load((RECIPES / "smoke.yaml").read_text())
    recipe["eval"][key] = value
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="runs code that is not part of this package"):
        load_recipe(str(path))
    options = cli._parser().parse_args(
        ["generate", "--model", "./x", "--out", str(tmp_path / "o"), "--config", str(path)]
    )
    with pytest.raises(ValueError, match="runs code that is not part of this package"):
        cli.read_config(options)
    assert not marker.exists()


def test_the_users_own_override_may_name_code(tmp_path, monkeypatch):
    (tmp_path / "mine_judge.py").write_text("def make(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe("smoke", ["eval.judges.detector=mine_judge:make"])
    assert recipe.eval.judges == {"detector": "mine_judge:make"}
