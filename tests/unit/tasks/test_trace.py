"""The lineage leads from a published pipeline to the records behind it, and breaks loudly on any change."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import trace as tracing
from tasks.manifest import load_manifest, seal


def record_id(i: int) -> str:
    return hashlib.sha256(f"image {i}".encode()).hexdigest()


def write(path: Path, files: dict[str, bytes]) -> Path:
    for file, content in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
    return path


def table(path: Path, ids: list[int], **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"key": [f"{i:04d}" for i in ids], "record_id": [record_id(i) for i in ids], **columns}
    pq.write_table(pa.table(data), path)


@pytest.fixture
def home(tmp_path) -> Path:
    """A whole arrow of stand-ins: 5 raw records, 3 kept, all of those with latents."""
    home = tmp_path / "home"

    def sealed(name, kind, files=None, parents=(), **counts):
        path = write(home / name, files or {"data.safetensors": name.encode()})
        seal(path, kind, [home / parent for parent in parents], counts=counts)
        return path

    table(home / "raw/records.parquet", [0, 1, 2, 3, 4])
    sealed("raw", "records", {"shards/00000.tar": b"raw 0", "shards/00001.tar": b"raw 1"}, records=5)
    table(home / "curated/records.parquet", [0, 2, 4])
    table(home / "curated/ledger.parquet", [0, 1, 2, 3, 4], kept=[True, False, True, False, True])
    sealed("curated", "curated", {"shards/00000.tar": b"kept"}, ["raw"], input=5, kept=3)
    sealed("components", "components", None, ["curated"])
    table(home / "latents/index.parquet", [0, 2, 4])
    sealed("latents", "latents", None, ["curated", "components"])
    sealed("checkpoints", "checkpoints", {"step-00000010/__0_0.distcp": b"weights"}, ["latents"])
    sealed("merged", "merged", None, ["checkpoints"])
    sealed("scorecard", "scorecard", {"scorecard.json": b"{}"}, ["merged", "components"])
    sealed("pipeline", "pipeline", None, ["merged", "components", "scorecard", "curated"])
    return home


def test_the_walk_reaches_every_directory_once_and_ends_at_the_records(home):
    nodes = tracing.walk(home / "pipeline")
    kinds = [node.manifest.kind for node in nodes.values()]
    assert kinds[0] == "pipeline"
    assert sorted(kinds) == sorted(
        ["pipeline", "merged", "components", "scorecard", "curated", "checkpoints", "latents", "records"]
    )


def test_the_story_has_every_shards_digest_and_every_records_id(home):
    story = tracing.trace(home / "pipeline")
    nodes = {node["kind"]: node for node in story["nodes"]}
    assert nodes["records"]["shards"] == {
        "shards/00000.tar": hashlib.sha256(b"raw 0").hexdigest(),
        "shards/00001.tar": hashlib.sha256(b"raw 1").hexdigest(),
    }
    assert set(nodes["checkpoints"]["shards"]) == {"step-00000010/__0_0.distcp"}
    assert nodes["curated"]["counts"] == {"input": 5, "kept": 3}
    assert story["records"] == {
        "input": 5,
        "kept": 3,
        "used": 3,
        "ids": {f"{i:04d}": record_id(i) for i in (0, 2, 4)},
    }


def every_file() -> list[str]:
    return [
        "pipeline/data.safetensors",
        "merged/data.safetensors",
        "checkpoints/step-00000010/__0_0.distcp",
        "latents/index.parquet",
        "components/data.safetensors",
        "scorecard/scorecard.json",
        "curated/shards/00000.tar",
        "curated/ledger.parquet",
        "raw/shards/00001.tar",
        "raw/records.parquet",
    ]


@pytest.mark.parametrize("name", every_file())
def test_a_flipped_byte_anywhere_exits_1_and_names_the_file(home, capsys, name):
    content = bytearray((home / name).read_bytes())
    content[len(content) // 2] ^= 1
    (home / name).write_bytes(content)
    assert tracing.main([str(home / "pipeline")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and str(home / name) in err and "was changed" in err


@pytest.mark.parametrize("name", ["pipeline", "merged", "latents", "raw"])
def test_a_changed_manifest_anywhere_exits_1_and_names_it(home, capsys, name):
    path = home / name / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert tracing.main([str(home / "pipeline")]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latents", "curated", "raw"])
def test_a_lost_directory_exits_1_and_is_named_by_digest(home, capsys, name):
    digest = load_manifest(home / name).digest
    shutil.rmtree(home / name)
    assert tracing.main([str(home / "pipeline")]) == 1
    err = capsys.readouterr().err
    assert digest in err and "is gone" in err and "--home" in err


def test_a_lost_or_added_file_exits_1(home, capsys):
    (home / "raw/shards/00000.tar").rename(home / "raw/shards/00009.tar")
    assert tracing.main([str(home / "pipeline")]) == 1
    assert "lacks shards/00000.tar" in capsys.readouterr().err


def test_a_home_that_moved_is_searched_by_digest(home, tmp_path):
    moved = home.rename(tmp_path / "elsewhere")
    assert len(tracing.walk(moved / "pipeline")) == 8  # beside each other
    apart = (moved / "pipeline").rename(tmp_path / "downloads")
    with pytest.raises(ValueError, match="is gone"):
        tracing.walk(apart, home=tmp_path / "downloads")
    assert len(tracing.walk(apart, home=moved)) == 8


def test_a_parent_is_not_looked_for_among_what_is_still_being_written(home, capsys):
    (home / "half").mkdir()
    (home / "latents").rename(home / "half/latents")
    assert tracing.main([str(home / "pipeline")]) == 0
    (home / "half").rename(home / ".writing-0123")
    capsys.readouterr()
    assert tracing.main([str(home / "pipeline")]) == 1
    assert "latents" in capsys.readouterr().err


def test_a_directory_made_anew_at_the_recorded_place_is_not_taken_for_the_parent(home, capsys):
    old = load_manifest(home / "latents").digest
    (home / "latents/data.safetensors").write_bytes(b"other")
    seal(home / "latents", "latents", [home / "curated"])
    new = load_manifest(home / "latents").digest
    assert tracing.main([str(home / "pipeline")]) == 1
    err = capsys.readouterr().err
    assert old in err and f"now holds latents {new}" in err


@pytest.mark.parametrize(
    ("ledger", "kept", "used", "told"),
    [
        ([0, 1], [0, 1], [0, 7], "the latents hold record {} .1 in all., which the curated records do not have"),
        ([0, 1], [0, 7], [0], "the curated records hold record {} .1 in all., which the ledger do not have"),
        ([0, 1, 7], [0, 7], [0], "the ledger hold record {} .1 in all., which the raw records do not have"),
    ],
)
def test_a_record_that_no_table_before_it_has_breaks_the_lineage(tmp_path, ledger, kept, used, told):
    table(tmp_path / "raw/records.parquet", [0, 1])
    table(tmp_path / "curated/ledger.parquet", ledger)
    table(tmp_path / "curated/records.parquet", kept)
    table(tmp_path / "latents/index.parquet", used)
    seal(tmp_path / "raw", "records")
    seal(tmp_path / "curated", "curated", [tmp_path / "raw"])
    seal(tmp_path / "latents", "latents", [tmp_path / "curated"])
    with pytest.raises(ValueError, match=told.format(record_id(7))):
        tracing.trace(tmp_path / "latents")


def test_something_that_is_not_sealed_exits_1(tmp_path, capsys):
    assert tracing.main([str(tmp_path)]) == 1
    assert "is not a sealed directory" in capsys.readouterr().err
    assert tracing.main([str(tmp_path), "--home", str(tmp_path / "no")]) == 1


def test_the_printed_tree_shows_each_directory_once_with_kind_digest_counts_and_shards(home, capsys):
    assert tracing.main([str(home / "pipeline")]) == 0
    out = capsys.readouterr().out
    for name in ("pipeline", "merged", "latents", "raw"):
        manifest = load_manifest(home / name)
        assert out.count(f"{manifest.kind} {manifest.digest}: ") == 1
    assert f"components {load_manifest(home / 'components').digest} (see above)" in out
    assert "3 files" in out and "5 records" in out and "3 kept" in out
    assert f"shard shards/00001.tar {hashlib.sha256(b'raw 1').hexdigest()}" in out
    assert "records: 5 raw, 3 kept, 3 with latents" in out


def test_records_lists_all_ids_where_the_summary_lists_a_few(tmp_path, capsys):
    table(tmp_path / "raw/records.parquet", list(range(20)))
    seal(tmp_path / "raw", "records")
    assert tracing.main([str(tmp_path / "raw")]) == 0
    out = capsys.readouterr().out
    assert out.count(record_id(0)) == 1 and record_id(19) not in out and "17 more" in out
    assert tracing.main([str(tmp_path / "raw"), "--records"]) == 0
    out = capsys.readouterr().out
    assert all(f"{i:04d} {record_id(i)}" in out for i in range(20))


def test_json_holds_everything(home, capsys):
    assert tracing.main([str(home / "pipeline"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tracing.trace(home / "pipeline")


def test_the_module_runs_as_a_command(home):
    command = [sys.executable, "-m", "tasks.trace", str(home / "pipeline")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pipeline ")
    (home / "raw/shards/00000.tar").write_bytes(b"raw O")
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1 and "raw/shards/00000.tar was changed" in broken.stderr


def test_rows_for_a_card_name_ancestors_even_when_they_are_gone(home):
    rows = tracing.lineage_rows([home / "merged", home / "components"])
    assert {row["kind"] for row in rows} == {"merged", "checkpoints", "latents", "components", "curated", "records"}
    digest = load_manifest(home / "curated").digest
    shutil.rmtree(home / "curated")
    rows = tracing.lineage_rows([home / "merged", home / "components"])
    assert digest in [row["digest"] for row in rows]
    assert tracing.lineage_rows([home]) == []
