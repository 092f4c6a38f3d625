"""Any number of stages: the nodes that a dynamic workflow makes in a pod, and whole reproductions of one, two and five
stages; other workflows in the same home."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
from recipe_home import Home, small_recipe

from model.config import MergeConfig
from tasks.manifest import load_manifest, seal, verify
from tasks.planning.sections import stages
from tasks.recipe import load_recipe
from tasks.trace import walk
from workflows.train import train_stages

STAGES = {1: [64], 2: [32, 64], 5: [32, 32, 48, 48, 64]}


@pytest.mark.parametrize("sizes_px", STAGES.values(), ids=len)
def test_a_pod_lays_out_as_many_stages_as_the_recipe_has(sizes_px, tmp_path, monkeypatch):
    """With inputs in an object store, which it passes on without a download."""
    recipe = load_recipe(small_recipe(tmp_path, sizes_px))
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


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def reproduced(home, tmp_path_factory) -> dict[int, tuple[dict[str, Path], dict[str, int]]]:
    """Stages -> outputs of the reproduction, and how many artifacts of each kind it added to those before."""
    runs = {}
    for count, sizes_px in STAGES.items():
        before = home.listing()
        recipe = small_recipe(tmp_path_factory.mktemp("recipe"), sizes_px)
        outputs = home.outputs(home.invoke("--recipe", recipe))
        after = home.listing()
        added = {kind: len(after[kind] - before.get(kind, set())) for kind in after}
        runs[count] = outputs, {kind: number for kind, number in added.items() if number}
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("count", STAGES)
def test_a_recipe_of_any_number_of_stages_is_reproduced(reproduced, home, count):
    outputs, _ = reproduced[count]
    for path in outputs.values():
        verify(path)
    nodes = walk(outputs["pipeline"], home.path).values()
    checkpoints = [node.manifest for node in nodes if node.manifest.kind == "checkpoints"]
    assert sorted(manifest.config["stage"]["name"] for manifest in checkpoints) == [f"stage{i}" for i in range(count)]
    sizes = {manifest.config["stage"]["name"]: manifest.config["stage"]["image_size_px"] for manifest in checkpoints}
    assert [sizes[f"stage{i}"] for i in range(count)] == STAGES[count]
    assert load_manifest(outputs["merged"]).config["model"]["capacity_factors"] == 2.0


@pytest.mark.slow
def test_recipes_share_the_corpus_the_components_and_equal_stages(reproduced):
    results = {"merged": 1, "images": 1, "answers": 1, "scorecard": 1, "pipeline": 1}
    (_, one), (_, two), (_, five) = reproduced.values()
    assert one["curated"] == one["components"] == one["checkpoints"] == 1
    parts = {kind: two.pop(kind) for kind in ("latents", "texts") if kind in two}
    assert parts.get("latents") and "texts" not in parts
    assert two == results | {"checkpoints": 2}
    assert five.pop("latents") and five == results | {"checkpoints": 4}  # its first stage is that of the two


@pytest.mark.slow
def test_training_evaluating_and_publishing_start_from_artifacts(reproduced, home, tmp_path):
    """Each command alone makes the same digests as a reproduction, and computes nothing again."""
    outputs, _ = reproduced[2]
    before, recipe = home.listing(), small_recipe(tmp_path, STAGES[2])
    components = next(
        node.path for node in walk(outputs["pipeline"], home.path).values() if node.manifest.kind == "components"
    )
    done = home.invoke("--recipe", recipe, workflow="curate")
    assert done.returncode == 0 and str(outputs["curated"]) in done.stdout, done.stderr[-3000:]
    done = home.invoke("--recipe", recipe, "--curated", str(outputs["curated"]), workflow="train")
    assert done.returncode == 0 and str(outputs["merged"]) in done.stdout, done.stderr[-3000:]
    options = ["--recipe", recipe, "--components", str(components)]
    given = ["--merged", str(outputs["merged"]), "--scorecard", str(outputs["scorecard"])]
    done = home.invoke(*options, *given, "--curated", str(outputs["curated"]), workflow="publish")
    assert done.returncode == 0 and str(outputs["pipeline"]) in done.stdout, done.stderr[-3000:]
    done = home.invoke("--recipe", recipe, workflow="pretrain")
    assert done.returncode == 0 and str(outputs["merged"]) in done.stdout, done.stderr[-3000:]
    assert home.listing() == before
    options += ["--model", str(outputs["merged"]), "--benchmarks", "shapes"]
    done = home.invoke(*options, workflow="evaluate")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    card = re.findall(r"/\S+/scorecard/[0-9a-f]{64}", done.stdout)[-1]
    scores = [
        json.loads((Path(path) / "scorecard.json").read_text())["overall"] for path in (card, outputs["scorecard"])
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_candidate_is_chosen_among_settings_windows_merged_weights_checkpoints_and_pipelines(
    reproduced, home, tmp_path
):
    (one, _), (two, _), (five, _) = reproduced.values()
    nodes = walk(two["pipeline"], home.path).values()
    (components,) = [node.path for node in nodes if node.manifest.kind == "components"]
    (checkpoints,), (others,) = (load_manifest(outputs["merged"]).parents for outputs in (two, one))
    recipe = small_recipe(tmp_path, STAGES[2])
    guidance = load_recipe(recipe).eval.guidance_scale
    names = [f"guidance_scale={guidance}", "guidance_scale=2", "last_n=1", "last_n=1+guidance_scale=2", str(five["merged"]), others.uri, str(one["pipeline"])]  # fmt: skip
    options = ["--model", str(two["pipeline"]), "--recipe", recipe, "--components", str(components)]
    before = home.listing()
    done = home.invoke(*options, "--benchmark", "shapes", "--candidates", "last_n=1", workflow="choose_candidate")
    message = " ".join(done.stderr.replace("│", " ").split())
    assert "candidate last_n=1 is another merge: give --checkpoints" in message and home.listing() == before
    options += ["--checkpoints", checkpoints.uri, "--benchmark", "shapes", "--candidates", ",".join(names)]
    done = home.invoke(*options, workflow="choose_candidate")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # After two steps, no weights beat others.
    said = done.stdout[done.stdout.index("shapes: the incumbent stays: the best of 6 differs by") :]
    assert f"{names[0]} is the same as incumbent" in said.splitlines()[0]
    assert re.findall(r"  p \d\.\d+  (\S+)$", said, re.M) == names[1:]
    added = {kind: home.listing()[kind] - before[kind] for kind in ("merged", "scorecard", "checkpoints")}
    assert (len(added["merged"]), len(added["scorecard"]), len(added["checkpoints"])) == (1, 7, 0)
    (window,) = (load_manifest(home.artifacts / "merged" / digest) for digest in added["merged"])
    assert window.config["merge"]["last_n"] == 1 and window.parents[0].digest == checkpoints.digest
    cards = [json.loads((home.artifacts / "scorecard" / d / "scorecard.json").read_text()) for d in added["scorecard"]]
    assert all(card["settings"]["prompt_set"] == "development" and card["counts"]["failed"] == 0 for card in cards)
    weights = [card["settings"]["model_digests"] for card in cards]
    assert sorted(digests["merged"] for digests in weights if "merged" in digests) == sorted(
        [window.digest] * 2 + [load_manifest(outputs["merged"]).digest for outputs in (five, one)]
    )


@pytest.mark.slow
def test_an_ablation_shares_the_data_and_ends_in_a_scorecard(reproduced, home, tmp_path):
    changes = {"model": {"routing": {"kind": "token_choice"}}, "train": {"losses": {"load_balance": 0.01}}}
    recipe = small_recipe(tmp_path, STAGES[2], name="token_choice", **changes)
    before = home.listing()
    made = home.outputs(home.invoke("--recipe", recipe, workflow="ablate"), of="Ablation")
    after = home.listing()
    added = {kind: len(after[kind] - before[kind]) for kind in after if after[kind] - before[kind]}
    assert added == {"checkpoints": 2, "merged": 1, "images": 1, "answers": 1, "scorecard": 1}
    for path in made.values():
        verify(path)
    assert json.loads((made["scorecard"] / "scorecard.json").read_text())["counts"]["failed"] == 0
    config = json.loads((made["merged"] / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "NucleusTransformer" and config["routing"]["kind"] == "token_choice"
    (checkpoints,) = [parent for parent in load_manifest(made["merged"]).parents if parent.kind == "checkpoints"]
    rows = (Path(checkpoints.uri) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["expert/dropped"] == 0


@pytest.mark.slow
def test_a_study_compares_what_exists_and_can_be_started_again(home, tmp_path):
    base = small_recipe(tmp_path, STAGES[1])
    variant = tmp_path / "variant.yaml"
    variant.write_text(
        yaml.safe_dump({"base": Path(base).name, "name": "variant", "model": {"routing": {"kind": "token_choice"}}})
    )
    options = ["--recipe", base, "--variants", str(variant), "--seeds", "0"]
    first = home.invoke(*options, workflow="study")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    again = home.invoke(*options, workflow="study")
    assert "step 1/" in first.stdout and "step 1/" not in again.stdout
    (study,) = (home.artifacts / "study").iterdir()
    verify(study)
    content = json.loads((study / "study.json").read_text())
    assert [run["variant"] for run in content["runs"]] == ["stages1", "variant"]
    assert content["changes"]["variant"]["model.routing.kind"] == "token_choice"
    cost = content["runs"][0]["cost"]
    assert cost["steps"] == 2 and cost["training_flops"] > 0 and 0 < cost["active_parameters"] < cost["parameters"]
    assert 0 <= content["runs"][0]["routing"]["routing_stability"] <= 1
    assert len([parent for parent in load_manifest(study).parents if parent.kind == "scorecard"]) == 2
