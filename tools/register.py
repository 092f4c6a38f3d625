"""Registers the workflows: images by digest, code from the images, the commit as version.

    python -m tools.register                     # config/flyte.yaml, one process a training stage
    python -m tools.register --shape 8x8         # 8 nodes of 8 accelerators: version COMMIT-8x8
    python -m tools.register --dry-run

containers/images.lock.json names the images (make images REGISTRY=...). The code in them must be that of the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from containers.build import BUILT_FROM, LOCK
from containers.lock import ROLES, ROOT
from tasks.site import SETTINGS, load_site

CONFIG = ROOT / "config" / "flyte.yaml"


def images(lock: Path) -> dict[str, str]:
    """Role -> image by digest, from a lock of images built from this commit.

    Raises:
        ValueError: no lock, a role is missing, or the images have other code: also files that git does not track.
    """
    if not lock.is_file():
        raise ValueError(f"{lock} does not exist: make images REGISTRY=... pushes the images and writes it")
    locked = json.loads(lock.read_text())
    if missing := [role for role in ROLES if role not in locked["images"]]:
        raise ValueError(f"{lock} has no image of {', '.join(missing)}: make images REGISTRY=... builds all roles")
    built = locked["revision"]
    same = (
        subprocess.run(["git", "diff", "--quiet", built, "--", *BUILT_FROM], cwd=ROOT, capture_output=True).returncode
        == 0
    )
    if not same:
        raise ValueError(
            f"the images of {lock} were built from {built}, and the code differs: make images REGISTRY=..."
        )
    listed = ["git", "ls-files", "--others", "--exclude-standard", "--", *BUILT_FROM]
    if untracked := subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        raise ValueError(
            f"{untracked[0]} is in no commit, so that the images of {lock} lack it: commit or remove it, then make images "
            "REGISTRY=..."
        )
    return {role: f"{locked['images'][role]['image']}@{locked['images'][role]['digest']}" for role in ROLES}


def shape(text: str) -> tuple[int, int]:
    """NODESxPROCESSES.

    Raises:
        argparse.ArgumentTypeError: not of that form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; use NODESxPROCESSES, such as 8x8")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--lock", type=Path, default=LOCK)
    parser.add_argument("--shape", type=shape, default=(1, 1), help="NODESxPROCESSES of a training stage")
    parser.add_argument("--dry-run", action="store_true", help="package and print, but send nothing")
    options = parser.parse_args(arguments)
    config = load_site(options.config)
    nnodes, nproc = options.shape
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    version = commit if options.shape == (1, 1) else f"{commit}-{nnodes}x{nproc}"
    environment = os.environ | {"NUCLEUS_TRAIN_NNODES": str(nnodes), "NUCLEUS_TRAIN_NPROC": str(nproc)}
    section = config["nucleus"]
    environment |= {name: str(section[key]) for key, name in SETTINGS.items() if section.get(key)}
    named = images(options.lock)
    environment |= {f"NUCLEUS_IMAGE_{role.upper()}": image for role, image in named.items()}
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "flyte.yaml"
        merged.write_text(yaml.safe_dump(config | {"images": named}))
        command = [
            str(Path(sys.executable).with_name("pyflyte")),
            "--config",
            str(merged),
            "register",
            "--copy",
            "none",
        ]
        command += ["--project", section["project"], "--domain", section["domain"], "--version", version]
        command += ["--dry-run"] if options.dry_run else []
        done = subprocess.run([*command, "workflows"], cwd=ROOT, env=environment)
    if done.returncode == 0:
        print(f"version {version} in {section['project']}/{section['domain']}")
    return done.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
