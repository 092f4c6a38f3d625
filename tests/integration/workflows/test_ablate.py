"""Reproducing an ablation is refused; ablations themselves are run in test_dynamic_stages.py."""

from __future__ import annotations

from recipe_home import Home, small_recipe


def test_reproduce_refuses_an_ablation_before_any_work(new_home: Home, tmp_path):
    recipe = small_recipe(tmp_path, [64], name="token_choice", model={"routing": {"kind": "token_choice"}})
    done = new_home.run("--recipe", recipe)
    assert done.returncode != 0 and not new_home.artifacts.is_dir()
    assert "is an ablation, and diffusers has no class that computes it" in " ".join(
        (done.stdout + done.stderr).split()
    )
