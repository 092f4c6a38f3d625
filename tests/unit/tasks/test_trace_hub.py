"""The lineage of a repository on the Hub, whose parents are found in the store by digest, without any pod."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub_server
from object_store import s3_bucket
from test_trace import build, record_id

from tasks import hub_directory
from tasks import trace as tracing
from tasks.curation import takedown
from tasks.manifest import MANIFEST, load_manifest, public_manifest

pytestmark = pytest.mark.slow

HUB = "hf://owner/model"
ROOT = Path(__file__).resolve().parents[3]
COMMANDS = re.findall(r"^(python -m tasks\.trace .*)$", (ROOT / "docs" / "cluster.md").read_text(), flags=re.MULTILINE)


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """A pipeline as `push` publishes it, and the home of its parents in S3. Yields (the repository's files, digest)."""
    home = tmp_path / "home"
    monkeypatch.setenv("NUCLEUS_HOME", str(home))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    pipeline = build()["pipeline"]
    manifest = load_manifest(pipeline)
    files = {name: (pipeline / name).read_bytes() for name in manifest.files}
    files |= {MANIFEST: public_manifest(manifest).model_dump_json().encode(), ".gitattributes": b"* lfs"}
    hub_directory._files.cache_clear()
    with s3_bucket("lineage") as fs, hub_server("owner/model", files) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        fs.put(str(home), "lineage/home", recursive=True)
        fs.put(str(home), "lineage/nucleus/store", recursive=True)
        for name, content in files.items():
            if name != ".gitattributes":
                fs.pipe_file(f"lineage/releases/nucleus/{name}", content)
        shutil.rmtree(home)
        yield files, manifest.digest


def trace(*words: str) -> int:
    hub_directory._files.cache_clear()  # as another process
    return tracing.main([HUB, "--home", "s3://lineage/home", *words])


@pytest.mark.slow
def test_a_repository_is_traced_to_its_records_at_a_commit_and_keeps_nothing_here(pushed, tmp_path, capsys):
    files, digest = pushed
    assert trace("--expect", digest) == 0
    out = capsys.readouterr().out
    assert f"at {HUB}@{COMMIT}" in out and "records: 6 in the ledger, 4 kept, 3 with latents" in out
    assert not (tmp_path / "home").exists()
    assert not list(Path(tmp_path).rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_document_traces_a_release_to_its_records(pushed, command, tmp_path):
    _, digest = pushed
    command = command.replace("YOUR-BUCKET", "lineage").replace("OWNER/NAME", "owner/model")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digest[:12] in done.stdout and "records: 6 in the ledger, 4 kept, 3 with latents" in done.stdout


def test_the_document_traces_a_release_in_a_bucket_and_on_the_hub():
    assert [command.split()[3].partition("://")[0] for command in COMMANDS] == ["s3", "hf"]


def test_a_flipped_byte_a_lost_and_an_added_file_on_the_hub_are_named(pushed, capsys):
    files, _ = pushed
    content = files["data.safetensors"]
    files["data.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    assert trace() == 1
    assert f"{HUB}@{COMMIT}/data.safetensors was changed" in capsys.readouterr().err
    del files["data.safetensors"]
    assert trace() == 1
    assert "lacks data.safetensors" in capsys.readouterr().err
    files |= {"data.safetensors": content, "added.bin": b"x"}
    assert trace() == 1
    assert "holds added.bin, which its manifest does not list" in capsys.readouterr().err


def test_another_digest_an_absent_repository_and_one_of_somebody_else_exit_1(pushed, capsys):
    files, _ = pushed
    assert trace("--expect", "0" * 64) == 1
    assert "was expected" in capsys.readouterr().err
    assert tracing.main(["hf://owner/other"]) == 1
    assert "the Hub has no such repository" in capsys.readouterr().err
    assert tracing.main(["hf://owner"]) == 1
    assert "must look like hf://OWNER/NAME" in capsys.readouterr().err
    del files[MANIFEST]
    assert trace() == 1
    assert f"it has no {MANIFEST}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_lineage_is_drawn_too(pushed, tmp_path):
    assert trace("--html", str(tmp_path / "lineage.html")) == 0
    assert COMMIT in (tmp_path / "lineage.html").read_text()


def test_a_takedown_names_the_repository_of_a_pipeline_that_had_the_record(pushed, tmp_path, capsys):
    _, digest = pushed
    (tmp_path / "list.txt").write_text(f"{record_id(0)}\n")
    hub_directory._files.cache_clear()
    arguments = [str(tmp_path / "list.txt"), "s3://lineage/home", HUB]
    assert takedown.main(arguments) == 1
    out = capsys.readouterr().out
    assert "1 records on the list, 1 of them used; 2 published pipelines had one" in out  # the other is in the store
    assert f"  pipeline {digest}: from " in out and f"at {HUB}@{COMMIT}" in out
    (tmp_path / "list.txt").write_text(f"{record_id(1)}\n")  # rejected by a rule
    assert takedown.main(arguments) == 0
    assert takedown.main([*arguments[:2], "hf://owner/other"]) == 2
    assert "the Hub has no such repository" in capsys.readouterr().err
