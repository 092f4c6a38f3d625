"""The training task, called again after a fault with another way of computing, continues the same work."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory
from train_helpers import train_config, training_stage, write_artifacts

from model.train.trainer import NucleusTrainer
from tasks.manifest import seal
from tasks.training.task import train_stage

pytestmark = pytest.mark.slow


def test_a_stage_resumes_from_its_checkpoint_in_other_micro_batches_and_with_other_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "file").write_text("nothing is sampled")
    inputs = {}
    seal(tmp_path / "components", "components")
    for kind, folder in (write_artifacts(tmp_path) | {"components": tmp_path / "components"}).items():
        inputs[kind] = FlyteDirectory(str(folder), remote_directory=False)

    def call(**changes) -> dict:
        stage = training_stage(train_config(steps=8, **changes))
        return json.loads((Path(train_stage.task_function(stage=stage, **inputs).path) / "report.json").read_text())

    real = NucleusTrainer.train_step

    def until_the_disk_fails(self, batches):
        if self.step == 7:
            raise OSError(errno.EIO, "Input/output error")
        real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(NucleusTrainer, "train_step", until_the_disk_fails)
        with pytest.raises(FlyteRecoverableException, match="Input/output error"):
            call()
    assert call(local_batch_size=4, log_every_steps=1)["resumed_from_step"] == 5
    assert call(optim={"muon_lr": 0.02, "adamw_lr": 0.01, "warmup_steps": 3})["resumed_from_step"] == 0
