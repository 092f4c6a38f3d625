"""The lineage leads from a published pipeline to its records, and any change is an error."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import s3_bucket

from tasks import trace as tracing
from tasks.lineage.ancestors import check_ancestors
from tasks.lineage.record_usage import used_by
from tasks.manifest import MANIFEST, load_manifest, seal
from tasks.publishing import task as publishing
from tasks.publishing.config import PublishConfig
from tasks.store import LOCATIONS, Part, make_sealed, write_index

LEDGER = {0: "", 1: "min_side", 2: "", 3: "", 4: "near_duplicate", 5: ""}  # record -> the rule that rejected it
SHARD = {0: "s0", 1: "s0", 2: "s0", 3: "s1", 4: "s1", 5: "s1"}
KINDS = [
    "pipeline",
    "merged",
    "components",
    "scorecard",
    "curated",
    "checkpoints",
    "latents",
    "images",
    "corpus",
    "records",
]


def record_id(i: int) -> str:
    return hashlib.sha256(f"image {i}".encode()).hexdigest()


def write(path: Path, files: dict[str, bytes]) -> None:
    for file, content in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)


def table(path: Path, ids: list[int], **columns) -> None:
    data = {"key": [f"{i:04d}" for i in ids], "record_id": [record_id(i) for i in ids], **columns}
    pq.write_table(pa.table(data), path)


def part(kind: str, name: str, file: str, ids: list[int], parents=()) -> Part:
    def make(out: Path) -> None:
        table(out / file, ids)
        write(out, {"data.safetensors": f"{kind} {name}".encode()} if kind == "latents" else {})

    path, manifest, _ = make_sealed(kind, make, parents, {"name": name}, lambda _: {"rows": len(ids)})
    return Part(name, kind, manifest.digest, str(path), len(ids))


def build(ledger=LEDGER, kept=(0, 2, 3, 5), used=(0, 3, 5), pipeline_parents=None) -> dict[str, Path]:
    """A whole lineage of stand-ins in NUCLEUS_HOME: 6 records of 2 shards, of which 4 are kept and 3 have latents."""
    made: dict[str, Path] = {}

    def artifact(kind, files=None, parents=(), tables=None, parts=(), name=None, **counts):
        def make(out: Path) -> None:
            write(out, files or {"data.safetensors": kind.encode()})
            for file, columns in (tables or {}).items():
                table(out / file, **columns)
            if parts:
                write_index(out, parts)

        behind = [made.get(parent, parent) for parent in parents]
        made[name or kind] = make_sealed(kind, make, behind, {"name": name}, lambda _: counts, (LOCATIONS,))[0]

    artifact("records", {"00000.tar": b"raw 0"}, rows=6)
    artifact("corpus", {"corpus.json": b"{}"}, ["records"], shards=2)
    shards = sorted(set(SHARD.values()))
    of = {shard: [i for i in SHARD if SHARD[i] == shard] for shard in shards}
    scores = {shard: part("scores", shard, "scores.parquet", of[shard]) for shard in shards}
    selections = [
        part("selections", shard, "selection.parquet", [i for i in kept if SHARD.get(i, "s0") == shard], [scores[shard].as_parent()])
        for shard in shards
    ]  # fmt: skip
    lines = {
        "ids": list(ledger),
        "kept": [not rule for rule in ledger.values()],
        "rule": list(ledger.values()),
        "shard": [SHARD.get(i, "s0") for i in ledger],
        "file": [f"{i:04d}.png" for i in ledger],
        "detail": [""] * len(ledger),
    }
    tables = {"ledger.parquet": lines}
    artifact("curated", {"report.json": b"{}"}, ["corpus"], tables, selections, input=len(ledger), kept=len(kept))
    artifact("components", None, ["curated"])
    latents = [
        part("latents", shard, "rows.parquet", [i for i in used if SHARD.get(i, "s0") == shard]) for shard in shards
    ]
    artifact("latents", {"report.json": b"{}"}, ["curated", "components"], None, latents, images=len(used))
    artifact("checkpoints", {"step-00000010/__0_0.distcp": b"weights"}, ["latents", "components"])
    artifact("merged", None, ["checkpoints"])
    artifact("images", {"images/0000.png": b"png"}, ["merged", "components"])
    artifact("scorecard", {"scorecard.json": b"{}"}, ["images"])
    wanted = pipeline_parents or ["merged", "components", "scorecard", "curated"]
    artifact("pipeline", None, wanted)
    made |= {f"{p.kind} {p.name}": Path(p.uri) for p in (*scores.values(), *selections, *latents)}
    return made


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def made(home) -> dict[str, Path]:
    return build()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_walk_reaches_every_directory_once_and_ends_at_the_records(made):
    nodes = tracing.walk(made["pipeline"])
    kinds = [node.manifest.kind for node in nodes.values()]
    assert kinds[0] == "pipeline" and sorted(kinds) == sorted(KINDS)
    assert all(node.path == made[node.manifest.kind] for node in nodes.values())


def test_the_story_has_every_shards_and_parts_digest_and_counts_the_records(made):
    story = tracing.trace(made["pipeline"])
    nodes = {node["kind"]: node for node in story["nodes"]}
    assert nodes["records"]["shards"] == {"00000.tar": hashlib.sha256(b"raw 0").hexdigest()}
    assert set(nodes["checkpoints"]["shards"]) == {"step-00000010/__0_0.distcp"}
    assert nodes["curated"]["parts"] == {s: load_manifest(made[f"selections {s}"]).digest for s in ("s0", "s1")}
    assert nodes["latents"]["parts"] == {s: load_manifest(made[f"latents {s}"]).digest for s in ("s0", "s1")}
    assert nodes["curated"]["counts"] == {"input": 6, "kept": 4}
    assert story["records"] == {"input": 6, "kept": 4, "used": 3}
    records = list(tracing.Lineage(made["pipeline"]).records())
    assert records == [(f"{i:04d}", record_id(i)) for i in (0, 2, 3, 5)]


FILES = [
    ("pipeline", "data.safetensors"),
    ("merged", "data.safetensors"),
    ("checkpoints", "step-00000010/__0_0.distcp"),
    ("latents", "parts.parquet"),
    ("latents s1", "data.safetensors"),
    ("components", "data.safetensors"),
    ("scorecard", "scorecard.json"),
    ("images", "images/0000.png"),
    ("selections s0", "selection.parquet"),
    ("scores s1", "scores.parquet"),
    ("curated", "ledger.parquet"),
    ("corpus", "corpus.json"),
    ("records", "00000.tar"),
]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_flipped_byte_anywhere_exits_1_and_names_the_file(made, capsys, name, file):
    flip(made[name] / file)
    assert tracing.main([str(made["pipeline"])]) == 1
    out, err = capsys.readouterr()
    assert out == "" and str(made[name] / file) in err and "was changed" in err


@pytest.mark.parametrize("name", ["pipeline", "merged", "latents", "records"])
def test_a_changed_manifest_anywhere_exits_1_and_names_it(made, capsys, name):
    path = made[name] / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert tracing.main([str(made["pipeline"])]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latents", "curated", "records", "selections s1", "scores s0"])
def test_a_lost_directory_exits_1_and_is_named_by_digest(made, capsys, name):
    digest = load_manifest(made[name]).digest
    shutil.rmtree(made[name])
    assert tracing.main([str(made["pipeline"])]) == 1
    err = capsys.readouterr().err
    assert digest in err and "is gone" in err and "--home" in err


def test_a_lost_or_added_file_exits_1(made, capsys):
    (made["records"] / "00000.tar").rename(made["records"] / "00009.tar")
    assert tracing.main([str(made["pipeline"])]) == 1
    assert "lacks 00000.tar" in capsys.readouterr().err


def test_a_home_that_moved_is_searched_by_digest(made, home, tmp_path):
    inside = made["pipeline"].relative_to(home)
    moved = home.rename(tmp_path / "elsewhere")
    assert len(tracing.walk(moved / inside)) == len(KINDS)  # beside each other
    apart = (moved / inside).rename(tmp_path / "downloads")
    with pytest.raises(ValueError, match="is gone"):
        tracing.walk(apart, home=tmp_path / "downloads")
    assert len(tracing.walk(apart, home=moved)) == len(KINDS)
    (moved / "artifacts").rename(moved / "other")  # not where artifacts are kept: all of it is searched
    assert len(tracing.walk(apart, home=moved)) == len(KINDS)


def test_a_parent_is_not_looked_for_among_what_is_still_being_written(made, home, capsys):
    (home / "half").mkdir()
    made["latents"].rename(home / "half/latents")
    assert tracing.main([str(made["pipeline"]), "--home", str(home)]) == 0
    (home / "half").rename(home / ".writing-0123")
    capsys.readouterr()
    assert tracing.main([str(made["pipeline"]), "--home", str(home)]) == 1
    assert "latents" in capsys.readouterr().err


def test_a_new_directory_at_the_recorded_path_is_not_mistaken_for_the_parent(made, capsys):
    old = load_manifest(made["components"]).digest
    (made["components"] / "data.safetensors").write_bytes(b"other")
    seal(made["components"], "components", [made["curated"]])
    new = load_manifest(made["components"]).digest
    assert tracing.main([str(made["pipeline"])]) == 1
    err = capsys.readouterr().err
    assert old in err and f"now holds the digest {new}" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"used": (0, 7)}, "the latents of shard s0 have record {} .1 in all., which was not kept"),
        ({"used": (0, 1)}, "the latents of shard s0 have record .* which was not kept"),
        ({"kept": (0, 2, 3, 5, 7)}, "the selection of shard s0 keeps record {} .1 in all., which the ledger does not"),
        ({"kept": (0, 3, 5), "used": (0,)}, "the ledger of shard s0 keeps record .* which the selection does not"),
        ({"ledger": {**LEDGER, 5: "nsfw"}}, "the selection of shard s1 keeps record .* which the ledger does not"),
    ],
)
def test_a_record_that_the_table_before_it_lacks_breaks_the_lineage(home, changes, message):
    made = build(**changes)
    with pytest.raises(ValueError, match=message.format(record_id(7))):
        tracing.trace(made["pipeline"])


def test_something_that_is_not_sealed_exits_1(tmp_path, capsys):
    assert tracing.main([str(tmp_path)]) == 1
    assert "is not a sealed directory" in capsys.readouterr().err
    assert tracing.main([str(tmp_path), "--home", str(tmp_path / "no")]) == 1


def test_the_printed_tree_shows_each_directory_once_with_kind_digest_counts_and_shards(made, capsys):
    assert tracing.main([str(made["pipeline"])]) == 0
    out = capsys.readouterr().out
    for name in KINDS:
        manifest = load_manifest(made[name])
        assert out.count(f"{manifest.kind} {manifest.digest}: ") == 1
    assert f"components {load_manifest(made['components']).digest} (see above)" in out
    assert "6 rows" in out and "4 kept" in out
    assert f"shard 00000.tar {hashlib.sha256(b'raw 0').hexdigest()}" in out
    assert f"part s1 {load_manifest(made['latents s1']).digest}" in out
    assert "records: 6 in the ledger, 4 kept, 3 with latents" in out


def test_records_lists_all_ids_and_the_summary_none(made, capsys):
    assert tracing.main([str(made["pipeline"])]) == 0
    assert record_id(0) not in capsys.readouterr().out
    assert tracing.main([str(made["pipeline"]), "--records"]) == 0
    out = capsys.readouterr().out
    assert all((f"{i:04d} {record_id(i)}" in out) == (i in (0, 2, 3, 5)) for i in LEDGER)


def test_json_is_the_story(made, capsys):
    assert tracing.main([str(made["pipeline"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tracing.trace(made["pipeline"])


@pytest.mark.slow
def test_the_module_runs_as_a_command(made):
    command = [sys.executable, "-m", "tasks.trace", str(made["pipeline"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pipeline ")
    (made["records"] / "00000.tar").write_bytes(b"raw O")
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1 and "00000.tar was changed" in broken.stderr


def test_rows_for_a_card_name_ancestors_even_when_they_are_gone(made, home):
    rows = tracing.lineage_rows([made["merged"], made["components"]])
    assert {row["kind"] for row in rows} == set(KINDS) - {"pipeline", "scorecard", "images"}
    digest = load_manifest(made["curated"]).digest
    shutil.rmtree(made["curated"])
    rows = tracing.lineage_rows([made["merged"], made["components"]])
    assert digest in [row["digest"] for row in rows]
    assert tracing.lineage_rows([home]) == []


# ---------------------------------------------------------------- before publishing


def check_before_publishing(made) -> None:
    check_ancestors(made["merged"], made["curated"], [made["components"], made["scorecard"]])


def test_a_whole_lineage_may_be_published_also_without_the_content_of_old_ancestors(made):
    check_before_publishing(made)
    for kind in ("records", "latents", "checkpoints"):
        for file in [file for file in made[kind].rglob("*") if file.is_file() and file.name != MANIFEST]:
            file.unlink()
    check_before_publishing(made)


@pytest.mark.parametrize("kind", ["checkpoints", "latents", "images", "corpus", "records"])
def test_a_model_with_a_lost_ancestor_is_not_published(made, kind):
    shutil.rmtree(made[kind])
    with pytest.raises(ValueError, match=f"was made from {kind} .*, which is gone"):
        check_before_publishing(made)


def test_a_model_with_a_replaced_ancestor_is_not_published(made):
    write(made["checkpoints"], {"step-00000010/__0_0.distcp": b"other weights"})
    seal(made["checkpoints"], "checkpoints", [made["latents"], made["components"]])
    with pytest.raises(ValueError, match="was made from checkpoints .*, which now holds the digest"):
        check_before_publishing(made)


def test_a_model_is_not_published_with_a_corpus_that_it_was_not_trained_on(made):
    other, digest = build(ledger=LEDGER | {6: ""}, kept=(0, 2, 3, 5, 6)), load_manifest(made["curated"]).digest
    with pytest.raises(ValueError, match=rf"was trained on other images \(curated: {digest}\)"):
        check_ancestors(made["merged"], other["curated"], [made["components"], made["scorecard"]])


def test_the_task_that_publishes_checks_the_lineage_first(made, monkeypatch):
    monkeypatch.setattr(publishing, "fetch", lambda directory, *_: directory)
    shutil.rmtree(made["records"])
    parents = {name: made[name] for name in ("merged", "components", "scorecard", "curated")}
    with pytest.raises(ValueError, match="was made from records .*, which is gone"):
        publishing.publish_pipeline.task_function(**parents, further=[], config=PublishConfig(), recipe_json="{}")


# ---------------------------------------------------------------- the root of trust


def test_another_digest_than_expected_exits_1_before_any_parent_is_read(made, capsys):
    digest = load_manifest(made["pipeline"]).digest
    assert tracing.main([str(made["pipeline"]), "--expect", digest]) == 0
    shutil.rmtree(made["records"])
    capsys.readouterr()
    assert tracing.main([str(made["pipeline"]), "--expect", "0" * 64]) == 1
    err = capsys.readouterr().err
    assert digest in err and "was expected" in err


@pytest.mark.parametrize("parents", [[], ["merged"], ["merged", "components", "scorecard"], ["components", "curated"]])
def test_a_pipeline_resealed_without_parents_exits_1(made, capsys, parents):
    seal(made["pipeline"], "pipeline", [made[name] for name in parents])
    assert tracing.main([str(made["pipeline"])]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "names no" in err


def test_a_curated_directory_resealed_without_its_corpus_exits_1(made, capsys):
    seal(made["curated"], "curated", logs=(LOCATIONS,))
    assert tracing.main([str(made["curated"])]) == 1
    assert "names no corpus" in capsys.readouterr().err


def test_a_parent_of_another_kind_than_the_manifest_says_is_refused(made, capsys):
    from tasks.manifest import Parent, as_parent

    parents = [as_parent(made[name]) for name in ("merged", "components", "scorecard", "curated")]
    parents[2] = Parent(kind="scorecard", digest=parents[1].digest, uri=parents[1].uri)
    seal(made["pipeline"], "pipeline", parents)
    assert tracing.main([str(made["pipeline"])]) == 1
    assert "'scorecard' is needed" in capsys.readouterr().err


def test_what_a_terminal_obeys_is_printed_escaped(tmp_path, capsys):
    write(tmp_path / "a", {"x\x1b[2J\x07.tar": b"1"})
    seal(tmp_path / "a", "records", config={})
    assert tracing.main([str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "x\\x1b[2J\\x07.tar" in out and "\x1b" not in out and "\x07" not in out
    (tmp_path / "a" / "x\x1b[2J\x07.tar").write_bytes(b"2")
    assert tracing.main([str(tmp_path / "a")]) == 1
    err = capsys.readouterr().err
    assert "x\\x1b[2J" in err and "\x1b" not in err


def test_a_recorded_place_of_another_scheme_is_not_opened(made, home, monkeypatch):
    """A foreign manifest names its parents' locations, which must not open other file systems."""
    from tasks.manifest import Parent, as_parent

    parents = [as_parent(made[name]) for name in ("merged", "components", "scorecard", "curated")]
    parents[0] = Parent(kind="merged", digest=parents[0].digest, uri="reference::http://127.0.0.1:9/x.json")
    seal(made["pipeline"], "pipeline", parents)
    monkeypatch.setattr("fsspec.implementations.reference.ReferenceFileSystem.__init__", None)
    assert len(tracing.walk(made["pipeline"])) == len(KINDS)


# ---------------------------------------------------------------- who had a record


def names(uses, has=True) -> set[str]:
    return {use.kind for use in uses if use.has == has}


def test_used_by_names_every_artifact_down_to_the_pipeline(made, home, capsys):
    uses = used_by(record_id(3), str(home))
    assert names(uses) == set(KINDS) - {"records", "corpus"} | {"scores", "selections"}
    assert [Path(use.uri) for use in uses if use.kind == "pipeline"] == [made["pipeline"]]
    assert [Path(use.uri) for use in uses if use.kind == "selections"] == [made["selections s1"]]
    assert used_by("0003", str(home)) == uses  # by its key
    assert tracing.main(["--used-by", record_id(3), str(home)]) == 0
    out = capsys.readouterr().out
    assert f"pipeline {load_manifest(made['pipeline']).digest}: " in out and "1 of them pipelines" in out


def test_a_rejected_record_is_only_in_its_scores_and_the_rule_is_named(made, home):
    uses = used_by(record_id(4), str(home))
    assert names(uses) == {"scores"}
    assert [(use.kind, use.why) for use in uses if not use.has] == [
        ("curated", "left out by near_duplicate, in ledger.parquet")
    ]


def test_an_unknown_record_exits_1(made, home, capsys):
    assert tracing.main(["--used-by", record_id(99), str(home)]) == 1
    assert "0 artifacts had it" in capsys.readouterr().out
    assert tracing.main(["--used-by", record_id(99), str(home / "no")]) == 1
    assert "has no artifacts" in capsys.readouterr().err


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_draws_every_directory_loads_nothing_and_escapes_what_it_shows(made, home, tmp_path, monkeypatch):
    out = tmp_path / "lineage.html"
    assert tracing.main([str(made["pipeline"]), "--html", str(out)]) == 0
    text = out.read_text()
    page = Tags()
    page.feed(text)
    anchors = {attributes["id"] for tag, attributes in page.tags if tag == "code" and "id" in attributes}
    assert anchors == {load_manifest(made[name]).digest for name in KINDS}
    assert sum(tag == "rect" for tag, _ in page.tags) == len(KINDS)
    assert sum(tag == "path" for tag, _ in page.tags) == sum(len(load_manifest(made[k]).parents) for k in KINDS)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert all(attributes["href"].startswith("#") for _, attributes in page.tags if "href" in attributes)
    evil = "<img src=x onerror=alert(1)>"
    seal(
        made["pipeline"],
        "pipeline",
        [made[n] for n in ("merged", "components", "scorecard", "curated")],
        counts={evil: 1},
    )
    assert tracing.main([str(made["pipeline"]), "--html", str(out)]) == 0
    assert "<img" not in out.read_text() and "&lt;img" in out.read_text()


# ---------------------------------------------------------------- an object store


@pytest.fixture
def remote(made, home):
    """The same home as objects; the local one is gone. Yields (file system, name of an artifact -> URI)."""
    with s3_bucket("lineage") as fs:
        fs.put(str(home), "lineage/home", recursive=True)
        uris = {name: f"s3://lineage/home/{path.relative_to(home)}" for name, path in made.items()}
        shutil.rmtree(home)
        yield fs, uris


@pytest.mark.slow
def test_a_lineage_in_s3_is_verified_without_a_local_copy(remote, home, capsys):
    fs, uris = remote
    assert tracing.main([uris["pipeline"]]) == 0
    out = capsys.readouterr().out
    assert "records: 6 in the ledger, 4 kept, 3 with latents" in out and f"at {uris['records']}" in out
    assert not home.exists()
    assert {use.kind for use in used_by(record_id(0), "s3://lineage/home")} >= {"pipeline", "latents", "selections"}


@pytest.mark.slow
def test_a_card_names_the_same_ancestors_when_they_are_in_s3(made, home, tmp_path, monkeypatch):
    expected = tracing.lineage_rows([made["merged"], made["components"]])
    assert len(expected) > 4 and all(row["counts"] or row["kind"] not in ("curated", "records") for row in expected)
    fetched = [shutil.copytree(made[name], tmp_path / "pod" / name) for name in ("merged", "components")]
    with s3_bucket("lineage") as fs:
        fs.put(str(home), "lineage/home", recursive=True)
        shutil.rmtree(home)
        monkeypatch.setenv("NUCLEUS_STORE", "s3://lineage/home")
        assert tracing.lineage_rows(fetched) == expected


@pytest.mark.slow
def test_a_flipped_byte_in_s3_is_found_and_named_by_its_uri(remote, capsys):
    fs, uris = remote
    for name, file in FILES:
        key = f"{uris[name]}/{file}".removeprefix("s3://")
        content = fs.cat_file(key)
        fs.pipe_file(key, content[:-1] + bytes([content[-1] ^ 1]))
        assert tracing.main([uris["pipeline"]]) == 1, name
        out, err = capsys.readouterr()
        assert out == "" and f"{uris[name]}/{file} was changed" in err
        fs.pipe_file(key, content)
    assert tracing.main([uris["pipeline"]]) == 0


@pytest.mark.slow
def test_a_published_place_leads_to_its_latest_version_and_from_there_to_the_home(remote, tmp_path, capsys):
    from tasks.publishing import s3

    fs, uris = remote
    fs.get(uris["pipeline"].removeprefix("s3://"), str(tmp_path / "pipeline"), recursive=True)
    s3.upload(tmp_path / "pipeline", "s3://lineage/published")
    digest = load_manifest(tmp_path / "pipeline").digest
    arguments = ["s3://lineage/published", "--home", "s3://lineage/home", "--expect", digest]
    assert tracing.main(arguments) == 0  # its manifest names no place: parents are there by digest
    assert f"s3://lineage/published/versions/{digest}" in capsys.readouterr().out
    fs.pipe_file(f"lineage/published/versions/{digest}/added", b"x")
    assert tracing.main(arguments) == 1
    assert "holds added, which its manifest does not list" in capsys.readouterr().err
