"""Any number of stages: what a dynamic workflow writes down in a pod, and whole reproductions of one and five stages."""

from __future__ import annotations

import json

import pytest
import yaml
from flyteidl.core import dynamic_job_pb2
from flytekit import FlyteContextManager
from flytekit.bin.entrypoint import execute_task_cmd
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.type_engine import TypeEngine
from flytekit.core.utils import write_proto_to_file
from flytekit.types.directory import FlyteDirectory
from object_store import s3_bucket

from model.config import MergeConfig
from tasks.manifest import load_manifest, seal, verify
from tasks.planning.sections import stages
from tasks.recipe import RECIPES, load_recipe
from workflows.train import train_stages

STAGE = {"steps": 2, "batch_size": 16, "capacity_factors": 2.0, "aspect_ratios": ["1:1", "3:2", "2:3"]}


def recipe_of(folder, sizes_px: list[int]) -> str:
    """The smoke recipe with a stage of two steps at each size, and few images to score."""
    values = {
        "base": str(RECIPES / "smoke.yaml"),
        "name": f"stages{len(sizes_px)}",
        "train": {
            "stages": [{"name": f"stage{i}", "image_size_px": size, **STAGE} for i, size in enumerate(sizes_px)],
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 2,
            "sample_every_steps": 0,
        },
        "merge": {"last_n": 2},
        "eval": {"seeds": [0], "prompts_per_task": 1, "num_inference_steps": 2},
    }
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("sizes_px", [[32], [32, 64], [32, 32, 48, 48, 64]], ids=len)
def test_a_pod_lays_out_as_many_stages_as_the_recipe_has(sizes_px, tmp_path, monkeypatch):
    """With inputs in an object store, which it passes on and does not download."""
    recipe = load_recipe(recipe_of(tmp_path, sizes_px))
    roles = ("curation", "encoder", "trainer")
    images = [Image(name=role, fqn=f"registry.example/{role}", tag="v1") for role in roles]
    settings = SerializationSettings(ImageConfig(default_image=images[0], images=images))
    monkeypatch.setenv("_F_SS_C", settings.serialized_context)
    monkeypatch.setattr(train_stages, "_wf", None)  # a pod executes one task; flytekit keeps what it compiled first
    values = {
        "stages": stages(recipe), "encoding": recipe.encoding, "merge": MergeConfig(last_n=2),
    }  # fmt: skip
    with s3_bucket("inputs"):
        from model import storage

        for kind in ("curated", "components"):
            (tmp_path / kind).mkdir()
            (tmp_path / kind / "file").write_text(kind)
            seal(tmp_path / kind, kind)
            for file in (tmp_path / kind).iterdir():
                storage.upload(file, f"s3://inputs/{kind}/{file.name}")
            values[kind] = FlyteDirectory(f"s3://inputs/{kind}")
        context = FlyteContextManager.current_context()
        kinds = {name: train_stages.python_interface.inputs[name] for name in values}
        literals = TypeEngine.dict_to_literal_map(context, values, kinds)
        write_proto_to_file(literals.to_flyte_idl(), str(tmp_path / "inputs.pb"))
        command = ["--inputs", tmp_path / "inputs.pb", "--output-prefix", tmp_path / "out"]
        command += ["--raw-output-data-prefix", tmp_path / "raw"]
        resolver = "flytekit.core.python_auto_container.default_task_resolver"
        command += ["--resolver", resolver, "--", "task-module", "workflows.train", "task-name", "train_stages"]
        execute_task_cmd.main([str(part) for part in command], standalone_mode=False)
    spec = dynamic_job_pb2.DynamicJobSpec.FromString((tmp_path / "out" / "futures.pb").read_bytes())
    called = [node.task_node.reference_id.name.split(".")[-1] for node in spec.nodes]
    count = len(sizes_px)
    assert sorted(called) == sorted(
        ["encode_texts", *["encode_latents"] * count, *["train_stage"] * count, "merge_checkpoints"]
    )
    trains = [node for node in spec.nodes if node.task_node.reference_id.name.endswith("train_stage")]
    starts = [{binding.var for binding in node.inputs if binding.binding.HasField("promise")} for node in trains]
    assert ["init" in inputs for inputs in starts] == [False] + [True] * (count - 1)
    (task,) = (task for task in spec.tasks if task.id.name == "tasks.training.task.train_stage")
    assert task.container.image == "registry.example/trainer:v1"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("sizes_px", [[64], [32, 32, 48, 48, 64]], ids=len)
def test_a_recipe_of_one_or_five_stages_is_reproduced(sizes_px, smoke, smoke_home, tmp_path):
    before = smoke_home.listing()
    made = smoke_home.outputs(smoke_home.run("--recipe", recipe_of(tmp_path, sizes_px)))
    after = smoke_home.listing()
    new = {kind: len(after[kind] - before[kind]) for kind in after if after[kind] - before[kind]}
    assert new == {"checkpoints": len(sizes_px), "merged": 1, "images": 1, "scorecard": 1, "pipeline": 1}
    for path in made.values():
        verify(path)
    config = load_manifest(made["merged"]).config
    assert config["model"]["capacity_factors"] == 2.0


@pytest.mark.long
@pytest.mark.slow
def test_training_evaluating_and_publishing_start_from_artifacts(smoke, smoke_home, tmp_path):
    """Two stages from a curated corpus; and what exists is not made again."""
    recipe = recipe_of(tmp_path, [32, 64])
    done = smoke_home.run("--recipe", recipe, "--curated", str(smoke["curated"]), workflow="train")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[stage0] step 1/2" in done.stdout and "[stage1] step 2/2" in done.stdout
    components = next(parent for parent in _lineage(smoke["pipeline"]) if load_manifest(parent).kind == "components")
    before = smoke_home.listing()
    given = {"merged": smoke["merged"], "components": components}
    options = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    done = smoke_home.run("--recipe", "smoke", *options, workflow="evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    options += ["--scorecard", str(smoke["scorecard"]), "--curated", str(smoke["curated"])]
    done = smoke_home.run("--recipe", "smoke", *options, workflow="publish")
    assert done.returncode == 0 and str(smoke["pipeline"]) in done.stdout, done.stderr[-3000:]
    assert smoke_home.listing() == before


@pytest.mark.long
@pytest.mark.slow
def test_a_study_compares_what_exists_and_can_be_started_again(smoke, smoke_home, tmp_path):
    base = recipe_of(tmp_path, [64])
    variant = tmp_path / "variant.yaml"
    variant.write_text(
        yaml.safe_dump({"base": base, "name": "variant", "model": {"routing": {"kind": "token_choice"}}})
    )
    options = ["--recipe", base, "--variants", str(variant), "--seeds", "0"]
    first = smoke_home.run(*options, workflow="study")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    again = smoke_home.run(*options, workflow="study")
    assert "step 1/" in first.stdout and "step 1/" not in again.stdout
    (study,) = (smoke_home.artifacts / "study").iterdir()
    verify(study)
    content = json.loads((study / "study.json").read_text())
    assert [run["variant"] for run in content["runs"]] == ["stages1", "variant"]
    assert content["changes"]["variant"]["model.routing.kind"] == "token_choice"
    cost = content["runs"][0]["cost"]
    assert cost["steps"] == 2 and cost["training_flops"] > 0 and 0 < cost["active_parameters"] < cost["parameters"]
    assert 0 <= content["runs"][0]["routing"]["routing_stability"] <= 1
    assert len([parent for parent in load_manifest(study).parents if parent.kind == "scorecard"]) == 2


def _lineage(pipeline) -> list:
    from tasks.trace import walk

    return [node.path for node in walk(pipeline, check=False).values()]
