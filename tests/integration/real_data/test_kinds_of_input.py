"""The kinds of input of docs/verified.md: each is used whole, or left out by name, or refused in one message.

What is refused goes through the command in this process, since no model is trained before; see `Home.invoke`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import kinds_that_are_read as read
import kinds_that_are_refused as refused
import pyarrow.parquet as pq
import pytest
from recipe_home import Home, left_over, small_recipe

from tasks.curation import check
from tasks.curation.curated import open_curated
from tasks.curation.sources import base
from tasks.encoding import ledger as encoding_ledger
from tasks.manifest import verify
from tasks.trace import walk

FOLDERS = [read.captions_and_tables, read.pictures, read.layouts, read.variants]
UNMATCHED = "metadata row that names no image"


@pytest.fixture(autouse=True)
def without_credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL", "FSSPEC_S3_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def decision_of(home: Home) -> Path:
    (ledger,) = (home.artifacts / "decisions").glob("*/ledger.parquet")
    return ledger.parent


def differences(source: read.Source, decision: Path) -> list[str]:
    """What became of the files of a source, where it is not what the source says; [] if all is."""
    account = json.loads((decision / base.REPORT).read_text())["account"]
    lines = list(check.fates(decision))
    by_file = {line["file"]: line for line in lines}
    unlike = []
    for file in sorted(by_file.keys() | source.outcomes.keys()):
        line, expected = by_file.get(file), source.outcomes.get(file)
        if line is None or expected is None:
            unlike.append(f"{file!a} is {'in the ledger only' if expected is None else 'missing in the ledger'}")
        elif line["captions"] != expected.captions or not line["fate"].startswith(expected.fate):
            unlike.append(f"{file!a}: {line['captions']!a}, {line['fate']}; expected {expected!a}")
    if account["skipped"] != source.left_out:
        unlike.append(f"left out {account['skipped']}; expected {source.left_out}")
    seen = source.entries() + source.left_out.get(UNMATCHED, [0])[0]
    left_out = sum(count for count, _ in account["skipped"].values())
    if not seen == account["seen"] == account["used"] + left_out:
        unlike.append(f"seen {account['seen']}, used {account['used']}, left out {left_out}; there are {seen}")
    if not len(lines) == len(by_file) == account["records"]:
        unlike.append(f"{len(lines)} lines of {len(by_file)} files, and {account['records']} records")
    return unlike


@pytest.mark.slow
@pytest.mark.parametrize("build", FOLDERS, ids=lambda build: build.__name__)
def test_each_file_is_kept_rejected_by_its_rule_or_left_out_by_name(build, new_home, tmp_path, monkeypatch, capsys):
    source = build(tmp_path / "source")
    monkeypatch.setenv("NUCLEUS_HOME", str(new_home.path / "nucleus"))
    assert check.main([str(source.path)]) == 0, capsys.readouterr().out
    assert not differences(source, decision_of(new_home))


@pytest.mark.long
@pytest.mark.parametrize("build", FOLDERS, ids=lambda build: build.__name__)
def test_the_whole_command_accounts_for_each_file_and_ends_in_a_pipeline(build, tmp_path, monkeypatch):
    source, home = build(tmp_path / "source"), Home(tmp_path / "home")
    recipe = small_recipe(tmp_path, [32])
    made = home.outputs(home.run("--recipe", recipe, "--source", str(source.path), timeout_s=3600))
    monkeypatch.setenv("NUCLEUS_HOME", str(home.path / "nucleus"))  # where `fates` looks
    assert not differences(source, decision_of(home))

    ledger = pq.read_table(made["curated"] / "ledger.parquet").to_pylist()
    kept = {name for name, outcome in source.outcomes.items() if outcome.fate == "kept"}
    assert {row["file"] for row in ledger} == source.outcomes.keys()
    assert {row["file"] for row in ledger if row["kept"]} == kept
    curated = open_curated(made["curated"])
    rows = [row for part in curated.parts() for row in curated.selection(part).to_pylist()]
    assert {row["locator"] for row in rows} == kept and len(rows) == len(kept)
    duplicates = [o.captions for o in source.outcomes.values() if o.fate == "exact_duplicate"]
    for row in rows:
        owners = [text for texts in (source.outcomes[row["locator"]].captions, *duplicates) for text in texts]
        assert row["captions"] and set(row["captions"]) <= set(owners), "captions to train on are the owner's, whole"

    special = sorted(
        (row["locator"], encoding_ledger.CAPTION_SPECIAL_TOKEN)
        for row in rows
        if row["split"] == "train" and "<|im_end|>" in row["captions"][0]
    )
    assert special or build is not read.captions_and_tables

    encoded = [node for node in walk(made["pipeline"]).values() if node.manifest.kind in ("texts", "latents")]
    reports = {node.path: json.loads((Path(node.path) / "report.json").read_text()) for node in encoded}
    wholes = {path: report for path, report in reports.items() if report["records"] == len(kept)}
    assert {report.get("image_size_px") for report in wholes.values()} == {None, 32}, "texts, and latents of one stage"
    for path, report in wholes.items():
        outcomes = encoding_ledger.outcomes(report)
        assert sum(outcomes.values()) == len(kept) and outcomes["encoded"] > 0
        rules = set(outcomes) - {"encoded", "held_out", "not_drawn"}
        assert rules <= set(encoding_ledger.RULES)
        named = pq.read_table(Path(path) / "encoding_ledger.parquet").to_pylist()
        rejected = sorted((row["file"], row["rule"]) for row in named if row["rule"])
        assert len(rejected) == sum(outcomes[rule] for rule in rules)
        if "image_size_px" in report:
            assert set(rejected) <= {(f"shapes/{name}.png", "shape_fits_no_bucket") for name in ("wide", "16x9")}
        else:
            assert rejected == special
    for output in ("pipeline", "scorecard"):
        verify(made[output])
    assert (made["pipeline"] / "model_index.json").is_file() and (made["scorecard"] / "scorecard.html").is_file()


@pytest.mark.long
def test_a_source_by_another_name_is_not_computed_again(new_home, tmp_path):
    folder, recipe = tmp_path / "own", small_recipe(tmp_path, [32])
    refused.captioned(count=6)(folder)
    first = new_home.outputs(new_home.invoke("--recipe", recipe, "--source", f"{folder}//"))
    assert pq.read_table(first["curated"] / "ledger.parquet")["kept"].to_pylist() == [True] * 6
    before = new_home.listing()
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "with a blank")
    shutil.copytree(folder, new_home.path / "own")
    for source in (tmp_path / "link", tmp_path / "with a blank", "~/own"):
        made = new_home.outputs(new_home.invoke("--recipe", recipe, "--source", str(source)))
        assert made == first, source
    made = new_home.outputs(new_home.invoke("--recipe", recipe, "--overrides", f"source.path={folder}"))
    assert made["curated"] == first["curated"]
    after = new_home.listing()
    assert all(after[kind] == before[kind] for kind in ("scores", "decisions", "checkpoints", "merged"))


@pytest.mark.long
def test_a_source_around_the_home_does_not_read_its_own_output(new_home, tmp_path):
    recipe = small_recipe(tmp_path, [32])
    refused.captioned(count=6)(new_home.path)
    for _ in range(2):
        made = new_home.outputs(new_home.invoke("--recipe", recipe, "--source", str(new_home.path)))
        assert pq.read_table(made["curated"] / "ledger.parquet")["kept"].to_pylist() == [True] * 6


@pytest.mark.long
def test_long_captions_are_kept_whole_where_the_limits_allow_it(new_home, tmp_path):
    caption = " ".join(["word"] * 71)
    refused.captioned(caption, count=6)(tmp_path / "own")
    limits = ["curation.captions.max_words=100", "encoding.max_text_tokens=256"]
    options = [argument for limit in limits for argument in ("--overrides", limit)]
    recipe = small_recipe(tmp_path, [32])
    made = new_home.outputs(new_home.invoke("--recipe", recipe, "--source", str(tmp_path / "own"), *options))
    curated = open_curated(made["curated"])
    captions = [texts for part in curated.parts() for texts in curated.selection(part)["captions"].to_pylist()]
    assert captions == [[caption]] * 6


def message_of(done: subprocess.CompletedProcess) -> str:
    """The one message of a refused command, without line breaks and blanks: messages are wrapped."""
    text = done.stdout + done.stderr
    assert done.returncode != 0, text
    assert "Traceback" not in text and text.count("─ Error ─") == 1, text
    message = "".join(text[text.index("─ Error ─") :].replace("│", " ").split())
    assert len(message) < 2000, text
    return message


def assert_says(message: str, parts: tuple[str, ...], place: Path | str = "") -> None:
    for part in parts:
        assert "".join(part.replace("{}", str(place)).split()) in message, message


def overriding(changes: tuple[str, ...]) -> list[str]:
    return [argument for change in changes for argument in ("--overrides", change)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", refused.SOURCES, ids=lambda kind: kind.name)
def test_a_source_is_refused_with_its_file_and_what_is_valid(kind, new_home, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    kind.write(folder)
    recipe = small_recipe(tmp_path, [32])
    done = new_home.invoke("--recipe", recipe, "--source", kind.source(folder), *overriding(kind.overrides))
    assert_says(message_of(done), kind.says, folder)
    assert not left_over(new_home)
    assert not new_home.listing().keys() & {"texts", "latents", "checkpoints", "merged", "scorecard", "pipeline"}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "says"), refused.OVERRIDES.values(), ids=refused.OVERRIDES)
def test_overrides_are_refused_by_their_keys(changes, says, new_home):
    done = new_home.invoke("--recipe", "smoke", *overriding(changes))
    assert_says(message_of(done), says)
    assert not new_home.artifacts.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("content", "says"), refused.RECIPES.values(), ids=refused.RECIPES)
def test_a_recipe_is_refused_with_its_file_and_place(content, says, new_home, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    done = new_home.invoke("--recipe", str(path))
    assert_says(message_of(done), says, path)
    assert not new_home.artifacts.exists()


@pytest.mark.slow
def test_overlays_in_a_circle_and_a_folder_as_recipe_are_refused(new_home, tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {other}.yaml\nname: {name}\n")
    assert_says(message_of(new_home.invoke("--recipe", str(tmp_path / "a.yaml"))), ("a.yaml -> b.yaml -> a.yaml",))
    known = ("is neither one of ablations/", "smoke, tiny nor a file")
    assert_says(message_of(new_home.invoke("--recipe", str(tmp_path))), known)
    assert not new_home.artifacts.exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["{}/file", "{}/file/below", "/proc/nucleus"])
def test_a_home_that_cannot_be_written_is_refused(place, new_home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    refused.captioned()(tmp_path / "own")
    place = place.format(tmp_path)
    environment = new_home.environment() | {"NUCLEUS_HOME": place}
    monkeypatch.setattr(new_home, "environment", lambda: environment)
    done = new_home.invoke("--recipe", "smoke", "--source", str(tmp_path / "own"), workflow="curate")
    assert_says(message_of(done), ("NUCLEUS_HOME={}",), place)


@pytest.mark.slow
def test_a_disk_that_fills_while_own_images_are_curated_ends_in_one_message(new_home, tmp_path):
    refused.captioned(count=6)(tmp_path / "own")
    disk = new_home.path / "nucleus"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = new_home.run("--recipe", "smoke", "--source", str(tmp_path / "own"), workflow="curate")
        assert_says(message_of(done), ("is full while making",))
        assert not left_over(new_home)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
