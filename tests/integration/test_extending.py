"""docs/extending.md, followed to the letter: a copy of the sources with a new loss and a new optimiser trains with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import json, sys
from pathlib import Path
from train_helpers import train_config, training_stage, transformer_config, write_latents
import torch
from model.plan.memory import Shapes
from model.plan.memory_trace import Step, end_bytes
from model.train.run import train_stage

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
latents = write_latents(folder / "latents")
found = {}
for name in ("plain", "changed"):
    train = train_config(steps=2, checkpoint_every_steps=2, keep_checkpoints=1, log_every_steps=1)
    if name == "changed":
        sections = {key: {**getattr(train, key).model_dump(), **values} for key, values in changes.items()}
        train = type(train)(**{**train.model_dump(), **sections})
    (folder / name).mkdir()
    report = train_stage(latents, training_stage(train), None, folder / f"work_{name}", folder / name)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    step = Step(2, 16, 8, torch.float32, "none", losses=train.losses.model_copy(update={"wavelet": 0.0}))
    found[name] = {
        "norm": lines[0]["grad_norm"], "rates": [key for key in lines[0] if key.startswith("lr/")],
        "loss": lines[-1]["loss"], "bytes": end_bytes(transformer_config(), step).tail_peak,
        "trained": Shapes(transformer_config(), train.optim.matrices).trained,
    }
print("FOUND", json.dumps(found))
"""


def blocks(section: str) -> dict[str, list[str]]:
    """Language -> code blocks of a section of the document, in order."""
    text = (ROOT / "docs" / "extending.md").read_text()
    body = re.search(rf"^## {section}\n(.*?)(?=^## )", text, re.M | re.S)[1]
    found: dict[str, list[str]] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", body, re.S):
        found.setdefault(language, []).append(code)
    return found


def followed(folder: Path, section: str, config_class: str, replaced: str, file: str) -> dict:
    """A copy of model/ with the section's changes, trained in plain and as its recipe says."""
    shutil.copytree(ROOT / "model", folder / "model")
    code = blocks(section)
    config = folder / "model" / "config.py"
    text = config.read_text()
    begin = text.index(f"class {config_class}(")
    line = re.compile(rf"^    {replaced}.*\n", re.M).search(text, begin)
    config.write_text(
        text[: line.start()] + code["python"][0] + text[line.end() if "matrices" in replaced else line.start() :]
    )
    with open(folder / "model" / file, "a") as source:
        source.write("\n\n" + code["python"][1])
    changes = yaml.safe_load(code["yaml"][0])["train"]
    path = f"{folder}:{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), json.dumps(changes)],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.rindex("FOUND ") + 6 :])


@pytest.mark.slow
def test_a_loss_is_trained_and_planned_after_a_field_and_a_function(tmp_path):
    found = followed(tmp_path, "A loss", "LossConfig", "router_z_loss", "losses.py")
    plain, changed = found["plain"], found["changed"]
    assert changed["norm"] > plain["norm"] and changed["loss"] != plain["loss"]
    assert changed["bytes"] > plain["bytes"]


@pytest.mark.slow
def test_an_optimiser_trains_and_is_planned_after_a_name_and_an_entry(tmp_path):
    found = followed(tmp_path, "An optimiser", "OptimConfig", "matrices", "optim.py")
    plain, changed = found["plain"], found["changed"]
    assert plain["rates"] == ["lr/Muon", "lr/AdamW"] and set(changed["rates"]) == {"lr/SGD", "lr/AdamW"}
    assert changed["loss"] != plain["loss"]
    assert changed["trained"]["sgd"] == plain["trained"]["muon"] > 0 == changed["trained"]["muon"]


def test_every_loss_and_optimiser_of_a_recipe_has_its_function():
    from typing import get_args

    from model.config import LossConfig, OptimConfig
    from model.losses import AFTER_STEP, LOSSES
    from model.optim import OPTIMIZERS

    assert set(LossConfig.model_fields) == {*LOSSES, *AFTER_STEP}
    assert set(get_args(OptimConfig.model_fields["matrices"].annotation)) == set(OPTIMIZERS)
