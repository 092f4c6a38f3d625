"""The images of the roles, hardened as in a pod: tasks of the smoke recipe through pyflyte-execute, over S3's protocol.

NUCLEUS_TEST_IMAGES names a lock file (containers/build.py writes it); .ci/containers builds the images and sets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import boto3
import pytest
from object_store import OWN, s3_server
from small_propeller import SmallPropeller, text

from containers.build import Engine

ROOT = Path(__file__).resolve().parents[2]
LOCK = os.environ.get("NUCLEUS_TEST_IMAGES")
BUCKET = "nucleus-test"
MODULES = {
    "curation": "tasks.planning.task tasks.curation.task",
    "scorer": "tasks.curation.task tasks.curation.scorers.hub tasks.curation.scorers.packaged",
    "encoder": "tasks.encoding.task",
    "trainer": "tasks.training.task tasks.merging.task model.train.run",
    "evaluator": "tasks.evaluation.task",
    "publisher": "tasks.publishing.task",
}
TOKEN = "hf_plantedNucleusToken"  # .ci/containers has it in its environment while it builds
pytestmark = pytest.mark.skipif(
    not LOCK, reason="NUCLEUS_TEST_IMAGES is unset: .ci/containers builds images and sets it"
)


def _images() -> dict[str, str]:
    lock = json.loads(Path(LOCK).read_text()) if LOCK else {"images": {}}
    return {role: f"{entry['image']}@{entry['digest']}" for role, entry in lock["images"].items()}


IMAGES = _images()


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


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_runs_as_an_ordinary_user_who_cannot_write_to_its_root(hardened, role):
    code = (
        "import os, pathlib; assert os.getuid() == os.getgid() == 10001; import tempfile; tempfile.mkdtemp()\n"
        "for path in ('/opt/nucleus/x', '/opt/venv/x', '/tmp/x', '/etc/x'):\n"
        "    try: pathlib.Path(path).write_text('')\n"
        "    except OSError: continue\n"
        "    raise SystemExit(path + ' is writable')"
    )
    hardened(role, ["python", "-c", code])


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_has_the_modules_of_its_tasks_the_recipes_and_the_revision(hardened, role):
    code = (
        f"import importlib; [importlib.import_module(m) for m in {MODULES[role]!r}.split()]\n"
        "import pathlib; assert pathlib.Path('/opt/nucleus/recipes/nucleus_17b.yaml').is_file()\n"
        "from tasks.manifest import code_version; print(code_version())"
    )
    revision = json.loads(Path(LOCK).read_text())["revision"]
    assert hardened(role, ["python", "-c", code]).stdout.strip().endswith(revision)


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_no_layer_or_configuration_of_an_image_has_the_token_of_who_built_it(role):
    command = [Engine.find("podman").name, "save", "--format", "docker-archive", IMAGES[role]]
    tail = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:  # layers are not compressed in it
        while block := archive.stdout.read(1 << 22):
            assert TOKEN.encode() not in tail + block
            tail = block[-len(TOKEN) :]
    assert archive.returncode == 0 and tail


@pytest.mark.parametrize("role", sorted(IMAGES))
def test_an_image_has_no_installer_and_compilers_only_where_kernels_are_compiled(hardened, role):
    look = "for name in pip g++ gcc git curl make; do command -v $name; done; true"
    present = hardened(role, ["sh", "-c", look]).stdout.split()
    names = {Path(path).name for path in present}
    assert names == ({"gcc", "g++"} if role == "trainer" else set())


@pytest.mark.skipif("trainer" not in IMAGES, reason="no trainer image was built")
def test_inductor_compiles_in_the_hardened_trainer(hardened):
    code = "import torch; f = torch.compile(lambda x: x.sin() + 1); assert torch.allclose(f(torch.ones(8)), torch.ones(8).sin() + 1)"
    hardened("trainer", ["python", "-c", code])


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("package") / "package.tgz"
    images = [
        part for role in MODULES for part in ("--image", f"{role}={IMAGES.get(role, f'absent/nucleus-{role}:v1')}")
    ]
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    command = [pyflyte, "--pkgs", "workflows", "package", *images, "--output", str(out), "-f"]
    site = {"NUCLEUS_STORE": f"s3://{BUCKET}/store", "NUCLEUS_ACCELERATOR": "none"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | site)
    return out


def local_digests(home: Path) -> dict[str, set[str]]:
    """Kind -> digests that the smoke recipe makes on this machine, without containers. NUCLEUS_TEST_SMOKE_HOME names the home
    of a run that was made before."""
    if not (made := os.environ.get("NUCLEUS_TEST_SMOKE_HOME")):
        made = str(home / "nucleus")
        pyflyte = str(Path(sys.executable).with_name("pyflyte"))
        command = [pyflyte, "run", "workflows/reproduce.py", "reproduce", "--recipe", "smoke"]
        place = {"HOME": str(home), "NUCLEUS_HOME": made, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=os.environ | place, check=True, capture_output=True)
    return {
        kind.name: {entry.name for entry in kind.iterdir() if (entry / "manifest.json").is_file()}
        for kind in (Path(made) / "artifacts").iterdir()
    }


class Stopped(Exception):
    """The next task's role has no image here."""


def test_the_smoke_recipe_runs_task_by_task_in_the_containers_to_the_digests_of_a_local_run(
    hardened, package, tmp_path
):
    """As far as there are images: of all five roles, to the published pipeline."""
    with s3_server() as endpoint:
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

        def run(role: str, args: list[str], environment: dict[str, str]) -> None:
            if role not in IMAGES:
                raise Stopped(role)
            done = hardened(role, args, environment | store | {"HF_TOKEN": TOKEN, "WANDB_MODE": "disabled"})
            assert TOKEN not in done.stdout + done.stderr, f"{args} prints the Hub's token"

        propeller = SmallPropeller(package, s3, BUCKET, run)
        workflow = next(name for name in propeller.plans if name.endswith(".reproduce"))
        with contextlib.suppress(Stopped):
            outputs = propeller.execute(workflow, recipe=text("smoke"))
            assert {"pipeline", "scorecard"} <= outputs.keys()
        manifests = s3_manifests(s3)
    assert propeller.done, "not even the first task ran"
    expected = local_digests(tmp_path)
    compared = []
    for key, content in manifests.items():
        manifest = json.loads(content)
        assert TOKEN.encode() not in content
        assert manifest["digest"] in expected[manifest["kind"]], f"{manifest['kind']} at {key} is no local artifact"
        compared.append(manifest["kind"])
    print("the digests of a local run:", dict(Counter(compared)))
    assert {"records", "scores", "curated"} <= set(compared)
    if set(MODULES) <= set(IMAGES):
        assert {"components", "latents", "checkpoints", "merged", "scorecard", "pipeline"} <= set(compared)


def s3_manifests(s3) -> dict[str, bytes]:
    """Key -> content, of the manifests of a bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {
        name: s3.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names if name.endswith("manifest.json")
    }
