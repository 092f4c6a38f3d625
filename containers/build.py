"""Builds the images of all roles, pushes them, and writes their digests to containers/images.lock.json.

    python -m containers.build                                             # CPU variants, in the local store
    python -m containers.build --variant cuda --registry registry.example/nucleus
    python -m containers.build --role curation --wheels wheels/            # no network: packages from a folder

Docker, Podman or Buildah builds, the first that works. Without --registry nothing is pushed and no lock is written: a
digest exists once a registry has the image. IMAGE_BUILD_FLAGS has further options for `build`, such as --network host,
and IMAGE_PUSH_FLAGS for `push`, such as --compression-format zstd. Bills of materials go to sbom/ next to the lock.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from containers import imports
from containers.lock import ROLES, ROOT

LOCK = ROOT / "containers" / "images.lock.json"
# Sources of an image: registration refuses images of other code.
BUILT_FROM = ("workflows", "tasks", "model", "eval", "recipes", "containers", "pyproject.toml")
LIST_PACKAGES = (
    "\nimport importlib.metadata as m\n"
    "print('\\n'.join(sorted(d.metadata['Name'] + '==' + d.version for d in m.distributions() if d.metadata['Name'])))"
)


class Engine:
    """A program that builds images."""

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def find(cls, wanted: str | None = None) -> Engine:
        """The wanted program, or the first that works here.

        Raises:
            ValueError: none works.
        """
        for name in [wanted] if wanted else ["docker", "podman", "buildah"]:
            if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
                return cls(name)
        raise ValueError(
            f"{wanted or 'neither docker, podman nor buildah'} works here: install one, or start its daemon"
        )

    def build(
        self, role: str, tag: str, arguments: dict[str, str], labels: dict[str, str], wheels: Path | None
    ) -> None:
        command = [self.name, "build", "--file", "containers/Dockerfile", "--target", role, "--tag", tag]
        for key, value in arguments.items():
            command += ["--build-arg", f"{key}={value}"]
        for key, value in labels.items():
            command += ["--label", f"{key}={value}"]
        if self.name != "docker":
            command += ["--layers"]
        if wheels:
            if self.name == "docker":
                raise ValueError("--wheels needs podman or buildah: docker build mounts no folder")
            command += ["--pull-never" if self.name == "buildah" else "--pull=never"]
            command += ["--volume", f"{wheels.resolve()}:/wheels:ro"]
        subprocess.run([*command, *shlex.split(os.environ.get("IMAGE_BUILD_FLAGS", "")), "."], cwd=ROOT, check=True)

    def run_python(self, tag: str, code: str, arguments: list[str]) -> str:
        """Standard output of a Python program in a container of the image, without network."""
        program = ["python", "-c", code, *arguments]
        if self.name == "buildah":
            container = subprocess.check_output(["buildah", "from", "--pull-never", tag], text=True).strip()
            try:
                return subprocess.check_output(["buildah", "run", container, "--", *program], text=True)
            finally:
                subprocess.run(["buildah", "rm", container], check=True, capture_output=True)
        return subprocess.check_output([self.name, "run", "--rm", "--network", "none", tag, *program], text=True)

    def push(self, tag: str, insecure: bool) -> str:
        """Pushes an image and returns its digest in the registry."""
        if self.name == "docker":
            subprocess.run(["docker", "push", tag], check=True)
            digests = subprocess.check_output(["docker", "inspect", "--format", "{{json .RepoDigests}}", tag])
            return next(d.split("@")[1] for d in json.loads(digests) if d.split("@")[0] == tag.rsplit(":", 1)[0])
        with tempfile.NamedTemporaryFile("r") as digest:
            options = [f"--digestfile={digest.name}", *(["--tls-verify=false"] if insecure else [])]
            options += shlex.split(os.environ.get("IMAGE_PUSH_FLAGS", ""))
            subprocess.run([self.name, "push", *options, tag], check=True)
            return digest.read().strip()

    def size(self, tag: str) -> int:
        """Bytes of the unpacked image."""
        if self.name == "buildah":
            listed = json.loads(subprocess.check_output(["buildah", "images", "--json", tag]))
            return _bytes(listed[0]["size"])
        return int(subprocess.check_output([self.name, "inspect", "--format", "{{.Size}}", tag]))


def _bytes(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])


def revision() -> str:
    """The commit, with -dirty if sources of an image differ from it."""
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    changed = subprocess.check_output(["git", "status", "--porcelain", "--", *BUILT_FROM], cwd=ROOT, text=True)
    return commit + ("-dirty" if changed.strip() else "")


def write_sbom(role: str, packages: str, folder: Path) -> Path | None:
    """Writes a CycloneDX bill of the image's packages, if cyclonedx-py is installed."""
    if not (
        program := shutil.which("cyclonedx-py", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    ):
        print(f"no SBOM of {role}: install cyclonedx-bom", file=sys.stderr)
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"{role}.cdx.json"
    subprocess.run([program, "requirements", "-", "--output-file", str(path)], input=packages, text=True, check=True)
    return path


def differences(role: str, packages: str) -> list[str]:
    """Packages of an image that the role's locks lack or have at another version; local versions (+cpu) count as equal.
    Leaves out CUDA's libraries, which torch itself pins."""
    files = (ROOT / "containers" / "requirements" / f"{role}{kind}.txt" for kind in ("", ".no-deps"))
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    wanted = {line.lower().replace("_", "-") for line in lines if line and not line.startswith(("#", "triton=="))}
    installed = {line.split("+")[0].lower().replace("_", "-").replace(".", "-", line.split("==")[0].count("."))
                 for line in packages.splitlines()}  # fmt: skip
    installed = {p for p in installed if not p.startswith(("nvidia-", "triton==", "cuda-", "nucleus-flyte=="))}
    return sorted(installed ^ wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", action="append", choices=ROLES, help="default: all; may be given several times")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--registry", help="where to push, such as registry.example/nucleus")
    parser.add_argument(
        "--insecure", action="store_true", help="the registry uses plain HTTP, such as one on this machine"
    )
    parser.add_argument("--base-image", help="default: the Dockerfile's")
    parser.add_argument("--torch-index", help="package index with torch's builds; default: the Dockerfile's")
    parser.add_argument(
        "--source", help="address of the code, for the images' labels; default: that of the remote origin"
    )
    parser.add_argument("--wheels", type=Path, help="a folder with all wheels: builds without network")
    parser.add_argument("--jobs", type=int, default=1, help="images to build at a time")
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"))
    parser.add_argument("--lock", type=Path, default=LOCK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine = Engine.find(options.engine)
    code = revision()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    arguments = {"VARIANT": options.variant, "REVISION": code, "VERSION": version}
    if options.base_image:
        arguments["BASE_IMAGE"] = options.base_image
    if options.torch_index is not None:
        arguments["TORCH_INDEX"] = options.torch_index
    source = (
        options.source
        or subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True).stdout
    )

    def make(role: str) -> tuple[str, dict[str, str]]:
        """Builds an image, checks it, and pushes it where there is a registry."""
        name = f"{options.registry or 'localhost'}/nucleus-{role}"
        tag = f"{name}:{code[:12]}{'-dirty' if code.endswith('-dirty') else ''}-{options.variant}"
        labels = {"title": f"nucleus {role}", "revision": code, "version": version, "licenses": "Apache-2.0"}
        if source.startswith("https://") and "@" not in source:  # no credentials, no paths
            labels["source"] = source.strip()
        labels = {f"org.opencontainers.image.{key}": value for key, value in labels.items()}
        engine.build(role, tag, arguments, labels, options.wheels)
        try:
            packages = engine.run_python(tag, imports.IMPORT + LIST_PACKAGES, imports.program_arguments(role))
        except subprocess.CalledProcessError:
            raise ValueError(f"the {role} image cannot import all that its tasks import (above)") from None
        if different := differences(role, packages):
            raise ValueError(
                f"the {role} image differs from containers/requirements/{role}.txt: {', '.join(different)}"
            )
        write_sbom(role, packages, options.lock.parent / "sbom")
        print(f"{tag}: {engine.size(tag) / 1e6:.0f} MB unpacked")
        return role, {"image": name, "digest": engine.push(tag, options.insecure) if options.registry else ""}

    roles = options.role or list(ROLES)
    # The first two make the layers that all share, or that all with torch share.
    images = dict([make(role) for role in roles[:2]])
    with ThreadPoolExecutor(options.jobs) as pool:
        images |= dict(pool.map(make, roles[2:]))
    if options.registry:
        known = json.loads(options.lock.read_text()) if options.lock.exists() else {}
        same = known.get("revision") == code and known.get("variant") == options.variant
        images = (known["images"] if same else {}) | images
        lock = {"revision": code, "variant": options.variant, "images": dict(sorted(images.items()))}
        options.lock.write_text(json.dumps(lock, indent=2) + "\n")
        print(f"digests: {options.lock}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
