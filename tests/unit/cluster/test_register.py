"""`make register` against a stand-in flyteadmin: what it sends to a cluster, and what it refuses to send."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flyteadmin import STOCK_LIMITS, flyteadmin, limits_of

from containers.lock import ROLES
from tasks.envs import CACHE_VERSIONS
from tasks.recipe import load_recipe
from tasks.site import load_site
from tools import register

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "sha256:" + "ab" * 32


def helm_limits() -> dict[str, str]:
    values = yaml.safe_load((ROOT / "k8s" / "helm" / "flyte-binary.yaml").read_text())
    return values["configuration"]["inline"]["task_resources"]["limits"]


def head() -> str:
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


@pytest.fixture(scope="module")
def lock(tmp_path_factory) -> Path:
    """A lock whose images have the working tree's code, committed or not."""
    tree = subprocess.check_output(["git", "stash", "create"], cwd=ROOT, text=True).strip() or head()
    images = {role: {"image": f"registry.example/nucleus-{role}", "digest": DIGEST} for role in ROLES}
    path = tmp_path_factory.mktemp("lock") / "images.lock.json"
    path.write_text(json.dumps({"revision": tree, "variant": "cuda", "images": images}))
    return path


def config(folder: Path, endpoint: str, **section: str) -> Path:
    path = folder / "flyte.yaml"
    nucleus = {"project": "nucleus", "domain": "production", "store": "s3://bucket/store"} | section
    path.write_text(yaml.safe_dump({"admin": {"endpoint": f"dns:///{endpoint}", "insecure": True}, "nucleus": nucleus}))
    return path


TOKEN = "planted-nucleus-token"
CREDENTIALS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.register", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict.fromkeys(CREDENTIALS, TOKEN)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def registered(lock, tmp_path_factory):
    """(the requests to flyteadmin, seconds of CPU), for the shape 8x8 on H100 with EFA, a queue and a secret."""
    return register_shape("8x8", lock, tmp_path_factory.mktemp("config"))


SITE = {
    "profile": "h100", "fabric": "efa", "queue": "training", "hub_secret": "nucleus-huggingface",
    "wandb_secret": "nucleus-wandb", "notify": "a@example.com", "store": "s3://bucket/store",
    "console": "https://flyte.example.com/console",
}  # fmt: skip


def register_shape(shape: str, lock: Path, folder: Path):
    with flyteadmin(helm_limits()) as (endpoint, admin):
        path = config(folder, endpoint, **SITE)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--config", str(path), "--lock", str(lock), "--shape", shape)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return admin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_everything_is_registered_by_digest_in_the_project_and_domain_at_the_commit(registered):
    admin, _ = registered
    assert (
        {"workflows.reproduce.reproduce", "workflows.pretrain.pretrain"} <= admin.workflows.keys() <= admin.plans.keys()
    )
    for request in (*admin.tasks.values(), *admin.workflows.values(), *admin.plans.values()):
        assert (request.id.project, request.id.domain) == ("nucleus", "production")
        assert request.id.version == f"{head()}-8x8"
    for name, request in admin.tasks.items():
        template = request.spec.template
        image = template.container.image or template.k8s_pod.pod_spec["containers"][0]["image"]
        assert re.fullmatch(rf"registry\.example/nucleus-({'|'.join(ROLES)})@{DIGEST}", image), name


@pytest.mark.slow
def test_the_shapes_launch_plan_is_registered_with_its_recipe(registered):
    admin, _ = registered
    plan = admin.plans["pretrain-nucleus_17b-8x8"].spec
    assert plan.fixed_inputs.literals["recipe"].scalar.primitive.string_value == "nucleus_17b"
    assert plan.max_parallelism == 64 and "reproduce-smoke" not in admin.plans


@pytest.mark.slow
def test_every_task_has_a_timeout_retries_a_template_and_no_code_to_fetch(registered):
    admin, _ = registered
    for name, request in admin.tasks.items():
        metadata = request.spec.template.metadata
        assert metadata.timeout.seconds > 0, name
        assert metadata.retries.retries >= 3, name
        assert metadata.pod_template_name.startswith("nucleus-"), name
        assert "pyflyte-fast-execute" not in request.spec.template.container.args, name


@pytest.mark.slow
def test_a_training_job_is_sized_queued_cleaned_up_and_has_efa(registered):
    admin, _ = registered
    template = admin.tasks["tasks.training.task.train_stage"].spec.template
    assert template.type == "pytorch" and template.metadata.pod_template_name == "nucleus-trainer-efa"
    assert template.custom["runPolicy"]["cleanPodPolicy"] == "CLEANPOD_POLICY_ALL"
    assert template.custom["elasticConfig"]["maxReplicas"] == 8
    assert template.metadata.metadata.labels["kueue.x-k8s.io/queue-name"] == "training"
    assert template.extended_resources.gpu_accelerator.device == "nvidia-h100"


@pytest.mark.slow
def test_only_tasks_that_reach_the_hub_declare_its_token(registered):
    admin, _ = registered
    declared = {n for n, r in admin.tasks.items() if "HF_TOKEN" in keys(r.spec.template)}
    assert "tasks.publishing.task.publish_pipeline" in declared
    assert {name.rpartition(".")[2] for name in declared} == HUB  # encoding reads untrusted images, and no repository


def keys(template) -> set[str]:
    return {secret.key for secret in template.security_context.secrets}


# Kind of task -> CPU, memory, ephemeral storage, seconds, interruptible; for the profile h100
LIGHT = ("1", "2Gi", "5Gi", 3600, False)
SHARD = ("4", "16Gi", "50Gi", 6 * 3600, True)
CAPTIONER = ("4", "16Gi", "50Gi", 7 * 86400, True)  # it waits for an endpoint
GATHER = ("16", "64Gi", "500Gi", 2 * 86400, False)
TABLES = ("16", "128Gi", "1600Gi", 2 * 86400, False)
PUBLISH = ("16", "128Gi", "500Gi", 2 * 86400, False)
MERGE = ("22", "220Gi", "1600Gi", 2 * 86400, False)
GPU = ("22", "220Gi", "800Gi", 7 * 86400, False)
TRAIN = {"1x1": ("22", "220Gi", "800Gi", 60 * 86400, True), "8x8": ("176", "1760Gi", "6400Gi", 60 * 86400, True)}
# Task -> role, kind, step of CACHE_VERSIONS or "" where Flyte caches nothing.
TASKS = {
    "planning.task.resolve_recipe": ("curation", LIGHT, ""),
    "planning.task.check_curated": ("curation", LIGHT, ""),
    "planning.task.choose_stage": ("curation", LIGHT, ""),
    "curation.task.make_group": ("curation", SHARD, ""),
    "curation.task.list_corpus": ("curation", GATHER, ""),
    "curation.task.score_group": ("scorer", SHARD, ""),
    "curation.task.score_group_on_gpu": ("scorer", GPU, ""),
    "curation.task.list_urls": ("curation", GATHER, ""),
    "curation.task.download_group": ("curation", SHARD, ""),
    "curation.task.draft_corpus": ("curation", TABLES, ""),
    "curation.task.caption_group": ("curation", CAPTIONER, ""),
    "curation.task.caption_group_gpu": ("scorer", GPU, ""),
    "curation.task.gather_captions": ("curation", GATHER, ""),
    "curation.task.decide_corpus": ("curation", TABLES, ""),
    "curation.task.select_group": ("curation", SHARD, ""),
    "curation.task.gather_curated": ("curation", GATHER, ""),
    "encoding.task.make_components": ("encoder", GPU, "components"),
    "encoding.task.plan_encoding": ("encoder", LIGHT, ""),
    "encoding.task.encode_texts_group": ("encoder", GPU, ""),
    "encoding.task.encode_latents_group": ("encoder", GPU, ""),
    "encoding.task.gather_texts": ("encoder", GATHER, ""),
    "encoding.task.gather_latents": ("encoder", GATHER, ""),
    "training.task.train_stage": ("trainer", None, "training"),
    "merging.task.merge_checkpoints": ("trainer", MERGE, "merging"),
    "evaluation.task.resolve_model": ("evaluator", LIGHT, ""),
    "evaluation.task.resolve_incumbent": ("evaluator", LIGHT, ""),
    "planning.task.plan_benchmarks": ("evaluator", LIGHT, ""),
    "evaluation.task.plan_generation": ("evaluator", LIGHT, ""),
    "evaluation.task.make_prompts": ("evaluator", GATHER, "prompts"),
    "evaluation.task.generate_part": ("evaluator", GPU, "evaluation"),
    "evaluation.task.generate_from_model": ("evaluator", GPU, "evaluation"),
    "evaluation.task.judge_images": ("evaluator", GPU, "evaluation"),
    "evaluation.task.score_answers": ("evaluator", GATHER, "evaluation"),
    "evaluation.task.gate": ("evaluator", LIGHT, ""),
    "evaluation.task.find_changed": ("evaluator", LIGHT, ""),
    "evaluation.task.store_score": ("evaluator", LIGHT, ""),
    "evaluation.task.gate_scores": ("evaluator", LIGHT, ""),
    "planning.task.plan_candidates": ("evaluator", LIGHT, ""),
    "evaluation.task.choose_scorecard": ("evaluator", LIGHT, ""),
    "study.task.plan_study": ("curation", LIGHT, ""),
    "study.task.describe_run": ("evaluator", GPU, "study"),
    "study.task.compare_runs": ("evaluator", LIGHT, "study"),
    "publishing.task.publish_pipeline": ("publisher", PUBLISH, "publishing"),
    "publishing.task.show_results": ("publisher", LIGHT, ""),
}
TEMPLATES = {
    "curation": "nucleus-curation",
    "scorer": "nucleus-curation",
    "publisher": "nucleus-publisher",
    "trainer": "nucleus-trainer",
}
HUB = {
    "score_group_on_gpu",
    "caption_group_gpu",
    "make_components",
    "publish_pipeline",
}


@pytest.fixture(scope="module", params=[pytest.param("1x1", marks=pytest.mark.slow), "8x8"])
def shape_and_admin(request, lock, tmp_path_factory):
    if request.param == "8x8":
        return request.param, request.getfixturevalue("registered")[0]
    return request.param, register_shape(request.param, lock, tmp_path_factory.mktemp("one"))[0]


def resources(template) -> tuple[str, ...]:
    limits = limits_of(template)
    return (limits["cpu"], limits["memory"], limits["ephemeralStorage"])


@pytest.mark.slow
def test_every_task_of_each_shape_has_its_image_size_time_cache_secrets_and_template(shape_and_admin):
    shape, admin = shape_and_admin
    templates = {name.removeprefix("tasks."): r.spec.template for name, r in admin.tasks.items()}
    own = {name for name in templates if not name.startswith("workflows.") and not name.endswith("-arraynode")}
    assert own == TASKS.keys(), "each task has a row"
    for name, (role, kind, step) in TASKS.items():
        template = templates[name]
        kind = kind or TRAIN[shape]
        metadata = template.metadata
        actual = (*resources(template), metadata.timeout.seconds, metadata.interruptible)
        assert actual == kind, name
        image = template.container.image or template.k8s_pod.pod_spec["containers"][0]["image"]
        assert image == f"registry.example/nucleus-{role}@{DIGEST}", name
        assert metadata.retries.retries == (100 if kind is TRAIN[shape] else 3), name
        assert metadata.discovery_version == (CACHE_VERSIONS[step] if step else ""), name
        assert metadata.discoverable == bool(step), name
        on_gpu = kind in (GPU, MERGE, TRAIN[shape])
        assert template.extended_resources.gpu_accelerator.device == ("nvidia-h100" if on_gpu else ""), name
        assert limits_of(template).get("gpu", "0") == (shape[-1] if kind is TRAIN[shape] else str(int(on_gpu))), name
        short = name.rpartition(".")[2]
        wanted = {"HF_TOKEN"} if short in HUB else {"WANDB_API_KEY"} if short == "train_stage" else set()
        assert keys(template) == wanted, name
        fabric = "-efa" if kind is TRAIN[shape] else ""
        assert metadata.pod_template_name == TEMPLATES.get(role, "nucleus-gpu") + fabric, name
        queued = short == "train_stage" and shape == "8x8"
        assert dict(metadata.metadata.labels) == ({"kueue.x-k8s.io/queue-name": "training"} if queued else {}), name


def environment(template) -> dict[str, str]:
    if template.WhichOneof("target") == "container":
        return {entry.key: entry.value for entry in template.container.env}
    return {entry["name"]: entry["value"] for entry in template.k8s_pod.pod_spec["containers"][0]["env"]}


@pytest.mark.slow
def test_every_pod_knows_its_image_and_the_shared_store_and_those_that_lay_out_tasks_the_whole_site(shape_and_admin):
    """A dynamic workflow's pod serialises tasks again: without the site's settings it would request other resources."""
    shape, admin = shape_and_admin
    site = {"NUCLEUS_PROFILE": "h100", "NUCLEUS_QUEUE": "training", "NUCLEUS_HUB_SECRET": "nucleus-huggingface"}
    site |= {f"NUCLEUS_IMAGE_{role.upper()}": f"registry.example/nucleus-{role}@{DIGEST}" for role in ROLES}
    site |= dict(zip(("NUCLEUS_TRAIN_NNODES", "NUCLEUS_TRAIN_NPROC"), shape.split("x")))
    laid_out = []
    for name, request in admin.tasks.items():
        template = request.spec.template
        image = template.container.image or template.k8s_pod.pod_spec["containers"][0]["image"]
        given = environment(template)
        assert given["NUCLEUS_IMAGE"] == image, name
        assert given["NUCLEUS_STORE"] == "s3://bucket/store" and given["NUCLEUS_CONSOLE"] == SITE["console"], name
        if name.startswith("workflows."):
            laid_out.append(name)
            assert given.items() >= site.items(), name
    assert {"workflows.curate.curate_source", "workflows.train.train_stages"} <= set(laid_out)


@pytest.mark.slow
def test_every_plan_of_each_shape_has_its_recipe_bounds_and_mails_and_no_active_schedule(shape_and_admin):
    shape, admin = shape_and_admin
    own = {name: request.spec for name, request in admin.plans.items() if not name.startswith("workflows.")}
    assert own and not admin.activated
    for name, spec in own.items():
        assert 0 < spec.max_parallelism <= 64, name
        (notification,) = spec.entity_metadata.notifications
        assert list(notification.email.recipients_email) == ["a@example.com"], name
        scheduled = spec.entity_metadata.schedule.WhichOneof("ScheduleExpression")
        assert bool(scheduled) == (name == "evaluate-nightly"), name
    recipes = {
        name: spec.fixed_inputs.literals["recipe"].scalar.primitive.string_value
        for name, spec in own.items()
        if "recipe" in spec.fixed_inputs.literals
    }
    for name, recipe in recipes.items():
        train = load_recipe(recipe).train
        assert shape == f"{train.nnodes}x{train.nproc_per_node}", name
    assert ("pretrain-nucleus_17b-8x8" in recipes) == (shape == "8x8")
    assert ("reproduce-tiny" in recipes) == (shape == "1x1")


@pytest.mark.slow
def test_nothing_of_each_shape_names_a_path_or_a_credential_of_the_machine_that_registers(shape_and_admin):
    _, admin = shape_and_admin
    for request in (*admin.tasks.values(), *admin.workflows.values(), *admin.plans.values()):
        for text in (str(ROOT), str(Path.home()), "/root", sys.prefix, TOKEN):
            assert text.encode() not in request.SerializeToString(), f"{request.id.name} has {text}"


@pytest.mark.slow
def test_registration_takes_less_than_ten_seconds(registered, lock, tmp_path):
    _, seconds = registered  # of CPU; importing torch for Elastic is most of it
    if seconds >= 10:  # CPUs that are shared do less in a second
        _, seconds = register_shape("8x8", lock, tmp_path)
    assert seconds < 10


@pytest.mark.slow
def test_stock_limits_refuse_large_tasks_and_a_small_profile_says_less(lock, tmp_path):
    with flyteadmin(STOCK_LIMITS) as (endpoint, _):
        done = run("--config", str(config(tmp_path, endpoint, profile="h100")), "--lock", str(lock))
    assert done.returncode != 0 and "greater than current limit" in done.stdout + done.stderr


def test_images_of_other_code_are_refused(tmp_path):
    first = subprocess.check_output(["git", "rev-list", "--max-parents=0", "HEAD"], cwd=ROOT, text=True).split()[0]
    images = {role: {"image": "r/x", "digest": DIGEST} for role in ROLES}
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"revision": first, "variant": "cuda", "images": images}))
    with pytest.raises(ValueError, match="the code differs"):
        register.images(path)
    path.write_text(json.dumps({"revision": first, "variant": "cuda", "images": {"trainer": images["trainer"]}}))
    with pytest.raises(ValueError, match="no image of curation"):
        register.images(path)
    with pytest.raises(ValueError, match="does not exist: make images"):
        register.images(tmp_path / "none.json")


def test_code_that_is_in_no_commit_is_refused(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for folder in ("tasks", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "known.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.lock.json\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    images = {role: {"image": "r/x", "digest": DIGEST} for role in ROLES}
    path = tmp_path / "tasks" / "images.lock.json"  # ignored by git
    path.write_text(json.dumps({"revision": commit, "variant": "cuda", "images": images}))
    (tmp_path / "docs" / "new.md").write_text("")  # in no image
    monkeypatch.setattr(register, "ROOT", tmp_path)
    assert register.images(path).keys() == set(ROLES)
    (tmp_path / "tasks" / "new.py").write_text("")
    with pytest.raises(ValueError, match=r"tasks/new\.py is in no commit"):
        register.images(path)


def test_a_config_without_an_endpoint_or_with_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"copy config/flyte\.example\.yaml"):
        load_site(tmp_path / "none.yaml")
    path = config(tmp_path, "127.0.0.1:1", profil="h100")
    with pytest.raises(ValueError, match="nucleus.profil is unknown"):
        load_site(path)


def test_the_example_config_is_one_that_loads():
    assert load_site(ROOT / "config" / "flyte.example.yaml")["nucleus"]["profile"] == "h100"


@pytest.mark.parametrize("text", ["8", "0x8", "8x", "x8", "8x8x8"])
def test_a_shape_is_nodes_times_processes(text, capsys):
    with pytest.raises(SystemExit):
        register.main(["--shape", text])
    assert "NODESxPROCESSES" in capsys.readouterr().err
