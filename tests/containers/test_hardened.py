"""The images of the roles, hardened as in a pod: tasks of the smoke recipe through pyflyte-execute, over S3's protocol.

NUCLEUS_TEST_IMAGES names a lock file (containers/build.py writes it); .ci/containers builds the images and sets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections import Counter
from functools import cache
from pathlib import Path
from typing import IO, Any

import boto3
import pyarrow
import pytest
import yaml
from object_store import OWN, s3_server
from packaging.utils import canonicalize_name
from small_propeller import SmallPropeller, text

from containers import imports, lock
from containers.build import Engine
from tasks.curation.scorers import SCORERS
from tasks.recipe import RECIPES, recipe_text

ROOT = Path(__file__).resolve().parents[2]
LOCK = os.environ.get("NUCLEUS_TEST_IMAGES")
BUCKET = "nucleus-test"
# Megabytes of 10^6 bytes, unpacked.
MOST_MB = dict.fromkeys(lock.ROLES, 1700) | {"curation": 500}  # the planner's image, too
TOKEN = "hf_plantedNucleusToken"  # in the environment of .ci/containers during the build
pytestmark = pytest.mark.skipif(
    not LOCK, reason="NUCLEUS_TEST_IMAGES is unset: .ci/containers builds images and sets it"
)


def _images() -> dict[str, str]:
    lock = json.loads(Path(LOCK).read_text()) if LOCK else {"images": {}}
    return {role: f"{entry['image']}@{entry['digest']}" for role, entry in lock["images"].items()}


IMAGES = _images()


def _inspect(role: str, what: str) -> str:
    """One property of an image; pulls it by digest if the store does not have it."""
    podman = Engine.find("podman").name
    if subprocess.run([podman, "image", "exists", IMAGES[role]]).returncode:
        subprocess.run([podman, "pull", "--quiet", "--tls-verify=false", IMAGES[role]], check=True, capture_output=True)
    return subprocess.check_output([podman, "inspect", "--format", what, IMAGES[role]], text=True).strip()


def _blob(role: str, what: str) -> IO[bytes]:
    """A part of an image in the registry, which speaks plain HTTP."""
    host, _, repository = IMAGES[role].partition("@")[0].partition("/")
    accepted = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    return urllib.request.urlopen(urllib.request.Request(f"http://{host}/v2/{repository}/{what}", headers=accepted))


@cache
def _manifest(role: str) -> dict[str, Any]:
    with _blob(role, f"manifests/{IMAGES[role].partition('@')[2]}") as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def hardened():
    """Runs a command in a role's container: read-only root, no capabilities, one writable mount, a memory limit."""
    engine = Engine.find("podman")

    def run(role: str, command: list[str], environment: dict[str, str] | None = None, check: bool = True):
        limits = ["--memory", "6g", "--pids-limit", "512", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        variables = [part for item in (environment or {}).items() for part in ("--env", "=".join(item))]
        mounts = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/scratch:rw,mode=1777,size=4g"]
        image = [*os.environ.get("NUCLEUS_TEST_RUN_FLAGS", "").split(), IMAGES[role]]
        command = [engine.name, "run", "--rm", "--network", "host", *limits, *mounts, *variables, *image, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0 or not check, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return run


LOOK = """
import importlib, json, os, pathlib, shutil, sys, tempfile
writable = []
for path in ("/opt/nucleus/x", "/opt/venv/x", "/tmp/x", "/etc/x", tempfile.mkdtemp() + "/x"):
    try:
        pathlib.Path(path).write_text("")
    except OSError:
        continue
    writable.append(path)
for name in sys.argv[1:]:
    importlib.import_module(name)
from tasks.manifest import code_version
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "writable": writable,
    "programs": [name for name in ("pip", "g++", "gcc", "git", "curl", "make") if shutil.which(name)],
    "recipe": pathlib.Path("/opt/nucleus/recipes/nucleus_17b.yaml").is_file(),
    "code": code_version(),
}))
"""


@pytest.fixture(scope="module")
def seen(hardened):
    """What one program sees in a role's container."""

    @cache
    def look(role: str) -> dict[str, Any]:
        lines = hardened(role, ["python", "-c", LOOK, *imports.task_modules(role)]).stdout.splitlines()
        return json.loads(lines[-1])

    return look


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_runs_as_an_ordinary_user_who_cannot_write_to_its_root(seen, role):
    assert seen(role)["user"] == [10001, 10001]
    (scratch,) = seen(role)["writable"]
    assert scratch.startswith("/scratch/")


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_has_the_modules_of_its_tasks_the_recipes_and_the_revision(seen, role):
    assert seen(role)["recipe"]
    assert seen(role)["code"].endswith(json.loads(Path(LOCK).read_text())["revision"])


@pytest.mark.skipif(not IMAGES, reason="no image was built")
def test_no_layer_or_configuration_of_an_image_has_the_token_of_who_built_it():
    """Checks each layer in the registry once."""
    parts = {}
    for role in IMAGES:
        manifest = _manifest(role)
        parts |= {part["digest"]: (role, part["mediaType"]) for part in [manifest["config"], *manifest["layers"]]}
    read = 0
    for digest, (role, kind) in parts.items():
        compression = kind.partition("+")[2]
        with _blob(role, f"blobs/{digest}") as raw:
            stream = pyarrow.input_stream(raw, compression=compression) if compression in ("gzip", "zstd") else raw
            tail = b""
            while block := stream.read(1 << 22):
                assert TOKEN.encode() not in tail + block, f"{digest} of the {role} image"
                tail, read = block[-len(TOKEN) :], read + len(block)
    assert read > max(int(_inspect(role, "{{.Size}}")) for role in IMAGES) * 0.9


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_is_no_larger_than_nodes_are_planned_for(role):
    compressed = sum(layer["size"] for layer in _manifest(role)["layers"]) / 1e6
    unpacked = int(_inspect(role, "{{.Size}}")) / 1e6
    print(f"{role}: {compressed:.0f} MB as pulled, {unpacked:.0f} MB unpacked")
    assert unpacked <= MOST_MB[role]


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_names_its_source_revision_and_version_and_has_a_bill_of_its_packages(role):
    labels = json.loads(_inspect(role, "{{json .Labels}}"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {key: labels[f"org.opencontainers.image.{key}"] for key in ("source", "revision", "version")}
    assert named["revision"] == json.loads(Path(LOCK).read_text())["revision"]
    assert named["version"] == project["version"] and named["source"].startswith("https://")
    bill = json.loads((Path(LOCK).parent / "sbom" / f"{role}.cdx.json").read_text())
    listed = {canonicalize_name(part["name"]): part["version"].split("+")[0] for part in bill["components"]}
    lines = (ROOT / "containers" / "requirements" / f"{role}.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert wanted.items() <= listed.items()


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_has_no_installer_and_compilers_only_where_kernels_are_compiled(seen, role):
    assert set(seen(role)["programs"]) == ({"gcc", "g++"} if role == "trainer" else set())


SCORE = """
import numpy as np
from PIL import Image
from tasks.curation.config import ScorerConfig
from tasks.curation.scorers import SCORERS, Sample, build_scorer, chosen_scorers
image = Image.radial_gradient("L").convert("RGB")
sample = Sample(image, np.asarray(image), np.asarray(image.convert("L")), ("a bright circle",))
wanted = {spec.columns[0]: spec.name for spec in SCORERS if spec.resources == "shard" and not spec.required}
chosen = [one for one in chosen_scorers(ScorerConfig(**wanted)) if build_scorer(one)([sample])]
print(*sorted({one.spec.name for one in chosen}))
"""


@pytest.mark.skipif("scorer" not in IMAGES, reason="no scorer image was built")
def test_each_scorer_of_a_package_scores_a_picture_in_the_scorers_image(hardened):
    """Libraries that a model opens at its first picture are in the image, not only those that an import needs."""
    names = hardened("scorer", ["python", "-c", SCORE]).stdout.split()
    own = {spec.name for spec in SCORERS if spec.resources == "shard" and not spec.required}
    assert own <= set(names) and {"brisque", "blazeface", "conse", "open-nsfw", "pp-ocr"} <= own


@pytest.mark.skipif("trainer" not in IMAGES, reason="no trainer image was built")
def test_inductor_compiles_in_the_hardened_trainer(hardened):
    code = "import torch; f = torch.compile(lambda x: x.sin() + 1); assert torch.allclose(f(torch.ones(8)), torch.ones(8).sin() + 1)"
    hardened("trainer", ["python", "-c", code])


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("package") / "package.tgz"
    images = [
        part for role in lock.ROLES for part in ("--image", f"{role}={IMAGES.get(role, f'absent/nucleus-{role}:v1')}")
    ]
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    command = [pyflyte, "--pkgs", "workflows", "package", *images, "--output", str(out), "-f"]
    site = {"NUCLEUS_STORE": f"s3://{BUCKET}/store", "NUCLEUS_ACCELERATOR": "none"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | site)
    return out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Every step of the smoke recipe, with fewer scenes, optimizer steps and prompts."""
    stage = {"steps": 2, "batch_size": 4, "aspect_ratios": ["1:1", "3:2", "2:3"]}
    sizes = {32: 4.0, 48: 3.0, 64: 2.0}
    values = {
        "base": str(RECIPES / "smoke.yaml"),
        "name": "containers",
        "source": {"scenes": 48, "scene_size_px": 64, "digits": 12, "shards": 1, "defect_fraction": 0.1},
        "components": {"vae": {"steps": 4}, "text_encoder": {"steps": 4}, "min_psnr_db": 0.0},
        "model": {"num_layers": 4, "num_experts": 4, "moe_intermediate_dim": 64},
        "train": {
            "stages": [
                stage | {"name": f"at{s}px", "image_size_px": s, "capacity_factors": c} for s, c in sizes.items()
            ],
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 2,
            "sample_every_steps": 0,
        },
        "merge": {"last_n": 2},
        "eval": {"seeds": [0], "prompts_per_task": 1, "num_inference_steps": 1},
    }
    path = tmp_path_factory.mktemp("recipe") / "containers.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@contextlib.contextmanager
def local_run(home: Path, recipe: Path):
    """Runs a recipe on this machine without containers, in the background; yields a function that waits for its end and
    returns (kind, digest) of all artifacts."""
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    command = [pyflyte, "run", "workflows/reproduce.py", "reproduce", "--recipe", str(recipe)]
    place = {"HOME": str(home), "NUCLEUS_HOME": str(home / "nucleus"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    place["NUCLEUS_CODE_VERSION"] = json.loads(Path(LOCK).read_text())["revision"]  # the pipeline's card names it
    log = home / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stdout=out, stderr=out)

    def artifacts() -> set[tuple[str, str]]:
        assert process.wait() == 0, log.read_text()[-4000:]
        paths = (home / "nucleus" / "artifacts").glob("*/*/manifest.json")
        return {(manifest["kind"], manifest["digest"]) for manifest in map(json.loads, map(Path.read_text, paths))}

    try:
        yield artifacts
    finally:
        process.kill()
        process.wait()


class Stopped(Exception):
    """There is no image of the next task's role."""


def test_a_recipe_runs_task_by_task_in_the_containers_to_the_digests_of_a_local_run(
    hardened, package, recipe, tmp_path
):
    """From planning to the published pipeline, or as far as there are images of the roles."""
    with local_run(tmp_path, recipe) as local_artifacts, s3_server() as endpoint:
        s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        s3.create_bucket(Bucket=BUCKET)
        store = OWN | {"AWS_ENDPOINT_URL": endpoint, "FLYTE_AWS_ENDPOINT": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        store |= {
            "FLYTE_AWS_ACCESS_KEY_ID": "testing",
            "FLYTE_AWS_SECRET_ACCESS_KEY": "testing",
            "OMP_NUM_THREADS": "1",
        }
        used = Counter()

        def run(role: str, args: list[str], environment: dict[str, str]) -> None:
            if role not in IMAGES:
                raise Stopped(role)
            started = time.monotonic()
            done = hardened(role, args, environment | store | {"HF_TOKEN": TOKEN, "WANDB_MODE": "disabled"})
            used[role] += 1
            print(f"{role}, {time.monotonic() - started:.1f} s")
            assert TOKEN not in done.stdout + done.stderr, f"{args} prints the Hub's token"

        propeller = SmallPropeller(package, s3, BUCKET, run, workers=2)
        workflow = next(name for name in propeller.plans if name.endswith(".reproduce"))
        with contextlib.suppress(Stopped):
            outputs = propeller.execute(workflow, recipe=text(recipe_text(str(recipe))))
            assert {"pipeline", "scorecard"} <= outputs.keys()
        written = s3_contents(s3)
        expected = local_artifacts()
    assert propeller.done, "not even the first task ran"
    assert not [key for key, content in written.items() if TOKEN.encode() in content]
    manifests = [json.loads(content) for key, content in written.items() if key.endswith("/manifest.json")]
    made = {(manifest["kind"], manifest["digest"]) for manifest in manifests}
    print("tasks:", dict(used), "artifacts:", dict(Counter(kind for kind, _ in made)))
    assert made <= expected
    assert {"records", "scores", "curated"} <= {kind for kind, _ in made}
    if {"curation", "encoder", "trainer", "evaluator", "publisher"} <= IMAGES.keys():
        assert made == expected


def s3_contents(s3) -> dict[str, bytes]:
    """Key -> content, of all objects of the bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {name: s3.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}
