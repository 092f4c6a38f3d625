"""The corpus is processed in parts: each shard is scored and selected once, alone, and only its task reads it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from object_store import s3_bucket
from own_images import png, write_tar

from tasks.curation import flow
from tasks.curation.config import CaptionConfig, CurationConfig, FilterConfig, SourceConfig, TierConfig
from tasks.curation.curated import open_curated
from tasks.curation.decisions import selections
from tasks.curation.scoring import score
from tasks.manifest import load_manifest
from tasks.store import LOCATIONS, fetch_part, make_sealed, read_index, write_index

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05))
SOURCE = SourceConfig()


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def tars(tmp_path) -> Path:
    for i in range(3):
        write_tar(tmp_path / "source" / f"{i}.tar", range(4 * i, 4 * i + 4))
    return tmp_path / "source"


def curate(path: Path, config: CurationConfig = CONFIG) -> Path:
    return flow.curate_source(SOURCE, str(path), config)[0]


def parts_of(home: Path, kind: str) -> set[str]:
    """Digests of the parts of a kind; indices of parts are of the same kind."""
    return {p.name for p in (home / "artifacts" / kind).iterdir() if not (p / "parts.parquet").is_file()}


@pytest.fixture
def made(monkeypatch) -> Counter:
    """Kind -> how often scores and selections of a shard are made."""
    counts: Counter = Counter()
    for kind, module, name in (("scores", score, "score_shard"), ("selections", selections, "write_selection")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, kind=kind, real=real: counts.update([kind]) or real(*args))
    return counts


@pytest.mark.slow
def test_one_more_shard_costs_one_score_part_and_one_selections_part(tars, home, made):
    curate(tars)
    assert made == {"scores": 3, "selections": 3}
    before = {kind: parts_of(home, kind) for kind in ("scores", "selections")}
    write_tar(tars / "1a.tar", range(50, 54))  # between the others
    curate(tars)
    assert made == {"scores": 4, "selections": 4}
    for kind, known in before.items():
        after = parts_of(home, kind)
        assert known < after and len(after - known) == 1, kind


@pytest.mark.slow
def test_a_changed_image_redoes_its_own_shard(tars, made):
    curate(tars)
    write_tar(tars / "1.tar", [4, 5, 6, 99])
    assert open_curated(curate(tars)).num_records == 12
    assert made == {"scores": 4, "selections": 4}


@pytest.mark.slow
def test_a_new_threshold_makes_no_score_and_keeps_parts_of_shards_that_it_does_not_change(tars, home):
    curate(tars)
    scores, selected = parts_of(home, "scores"), parts_of(home, "selections")
    write_tar(tars / "3.tar", range(60, 63), caption="far too many words to be kept under a limit of six words {}")
    curate(tars)
    assert len(parts_of(home, "selections") - selected) == 1
    scores, selected = parts_of(home, "scores"), parts_of(home, "selections")
    limit = CONFIG.model_copy(update={"captions": CaptionConfig(max_words=6)})
    curated = open_curated(curate(tars, limit))
    assert curated.num_records == 12 and parts_of(home, "scores") == scores
    assert len(parts_of(home, "selections") - selected) == 1  # that of 3.tar, now empty


def test_a_group_reads_only_its_own_shards(tars):
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:  # an audit hook stays for the life of the process
        if watching and event == "open" and str(arguments[0]).endswith(".tar"):
            opened.append(Path(str(arguments[0])).name)

    corpus, _, _ = make_sealed(
        "corpus", lambda out: flow.write_corpus(SOURCE, str(tars), [], out), logs=flow.CORPUS_LOGS
    )
    sys.addaudithook(watch)
    (part,) = flow.score_group(corpus, CONFIG, 1, 3)
    watching = False
    assert not part.error and set(opened) == {"1.tar"}


@pytest.mark.slow
def test_another_number_of_groups_gives_the_same_parts(tars, home):
    curate(tars)
    known = parts_of(home, "scores"), parts_of(home, "selections")
    curated = curate(tars, CONFIG.model_copy(update={"max_groups": 2}))
    assert known == (parts_of(home, "scores"), parts_of(home, "selections"))
    assert open_curated(curated).num_records == 12


@pytest.mark.slow
def test_two_homes_give_the_same_digests_wherever_the_source_is(tars, tmp_path, monkeypatch):
    digests = []
    for name in ("a", "another"):  # of another length
        source = shutil.copytree(tars, tmp_path / name / "source")
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / name / "home"))
        digests.append(load_manifest(curate(source)).digest)
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_source_that_moved_is_read_where_it_is_now(tars, tmp_path):
    curate(tars)
    moved = shutil.move(tars, tmp_path / "moved")
    curated = open_curated(curate(Path(moved)))
    assert sum(len(list(curated.images(part))) for part in curated.parts()) == 12


@pytest.mark.slow
def test_a_made_source_gives_the_same_digests_in_two_homes(tmp_path, monkeypatch):
    source = SourceConfig(scenes=30, digits=4, scene_size_px=64, shards=2, defect_fraction=0.1)
    digests = []
    for name in ("a", "another"):  # of another length
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / name))
        curated, _ = flow.curate_source(source, "", CONFIG)
        digests.append(load_manifest(curated).digest)
        assert {parent.kind for parent in load_manifest(curated).parents} == {"corpus"}
        read = open_curated(curated)
        assert sum(len(list(read.images(part))) for part in read.parts()) == read.num_records > 20
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_failed_shard_is_named_and_only_it_is_made_the_next_time(tars, home, monkeypatch):
    real = score.score_shard

    def failing(corpus, shard, *rest):
        if shard.uri.endswith("1.tar"):
            raise OSError("the connection was closed")
        return real(corpus, shard, *rest)

    monkeypatch.setattr(score, "score_shard", failing)
    with pytest.raises(
        ValueError, match=r"1 of 3 shards could not be scored .*1\.tar: OSError: the connection was closed"
    ):
        curate(tars)
    assert len(parts_of(home, "scores")) == 2
    made = []
    monkeypatch.setattr(score, "score_shard", lambda *args: made.append(args[1].uri) or real(*args))
    assert open_curated(curate(tars)).num_records == 12
    assert [Path(uri).name for uri in made] == ["1.tar"]


@pytest.mark.slow
def test_within_the_ratio_a_failed_shard_is_a_row_of_the_ledger(tars, home, monkeypatch):
    real = score.score_shard

    def failing(corpus, shard, *rest):
        if shard.uri.endswith("1.tar"):
            raise OSError("the connection was closed")
        return real(corpus, shard, *rest)

    monkeypatch.setattr(score, "score_shard", failing)
    path = curate(tars, CONFIG.model_copy(update={"min_success_ratio": 0.6}))
    book = pd.read_parquet(path / "ledger.parquet")
    failed = book[book["rule"] == "shard_failed"]
    assert len(book) == 9 and failed["file"].str.endswith("1.tar").tolist() == [True]
    assert failed["detail"].item() == "OSError: the connection was closed"
    assert [part.error for part in read_index(path) if part.error] == ["OSError: the connection was closed"]
    assert open_curated(path).num_records == 8


def test_a_group_whose_task_never_finished_counts_as_failed(tars):
    corpus, _, _ = make_sealed(
        "corpus", lambda out: flow.write_corpus(SOURCE, str(tars), [], out), logs=flow.CORPUS_LOGS
    )
    parts = flow.score_group(corpus, CONFIG, 0, 3)
    index, _, _ = make_sealed("scores", lambda out: write_index(out, parts), logs=(LOCATIONS,))
    with pytest.raises(ValueError, match="2 of 3 shards could not be scored .*the task of its group did not"):
        flow.decide_corpus(corpus, [index, None, None], CONFIG, 3)


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_nothing_is_scored_twice(tars, home):
    code = f"""
import os, signal
from tasks.curation import flow
from tasks.curation.scoring import score
from tasks.curation.decisions import selections
from tasks.curation.config import SourceConfig
from {__name__} import CONFIG
real, count = score.score_shard, 0
def scoring(*arguments):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
score.score_shard = scoring
flow.curate_source(SourceConfig(), {str(tars)!r}, CONFIG)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = {p.name: p.stat().st_mtime_ns for p in (home / "artifacts" / "scores").iterdir() if p.name[0] != "."}
    assert open_curated(curate(tars)).num_records == 12
    scores = home / "artifacts" / "scores"
    assert all((scores / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(parts_of(home, "scores")) == 3


@pytest.mark.slow
def test_a_new_tier_setting_rewrites_selections_and_no_scores(tars, home):
    curate(tars, CONFIG.model_copy(update={"tiers": TierConfig(thresholds=(9.9, 9.8, 9.7, 9.6))}))
    scores, selected = parts_of(home, "scores"), parts_of(home, "selections")
    curate(tars, CONFIG.model_copy(update={"tiers": TierConfig(thresholds=(0.4, 0.3, 0.2, 0.1))}))
    assert parts_of(home, "scores") == scores and len(parts_of(home, "selections") - selected) == 3


@pytest.mark.slow
def test_bytes_that_changed_since_scoring_are_refused(tars):
    curated = open_curated(curate(tars))
    part = next(iter(curated.parts()))
    path = Path(curated.shard(part).uri)
    data = path.read_bytes()
    path.write_bytes(data.replace(png(0)[60:80], bytes(20), 1))
    with pytest.raises(ValueError, match=r"0\.tar.* changed"):
        list(curated.images(part))


@pytest.mark.slow
def test_images_are_the_kept_records_with_their_original_bytes(tars):
    (tars / "0.tar").unlink()
    write_tar(tars / "0.tar", [0, 1, 1, 2])
    curated = open_curated(curate(tars))
    seen = {}
    for part in curated.parts():
        table = curated.selection(part)
        for i, record in curated.images(part):
            assert table["key"][i].as_py() == record.key
            seen[table["locator"][i].as_py()] = record.data
    assert seen["1.tar:p004.png"] == png(4) and len(seen) == curated.num_records


@pytest.mark.slow
def test_pods_share_parts_through_the_store_and_fetch_what_they_need(tars, tmp_path, monkeypatch):
    with s3_bucket("corpora") as bucket:
        monkeypatch.setenv("NUCLEUS_STORE", "s3://corpora/nucleus")
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "pod1"))
        curated = curate(tars)
        shutil.rmtree(tmp_path / "pod1" / "artifacts" / "scores")
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "pod2"))
        monkeypatch.setattr(score, "score_shard", None)  # nothing is scored again
        read = open_curated(curate(tars))
        assert sum(len(list(read.images(part))) for part in read.parts()) == 12
        assert load_manifest(read.path).digest == load_manifest(curated).digest
        assert all(part.uri.startswith("s3://corpora/nucleus/artifacts/") for part in read.parts())
        # A group's task downloads only its group's share of the decision.
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "pod3"))
        _, decision = flow.curate_source(SOURCE, str(tars), CONFIG, until="decisions")
        shutil.rmtree(tmp_path / "pod3" / "artifacts" / "decisions", ignore_errors=True)
        flow.select_group(decision, CONFIG, 1, 3)
        fetched = tmp_path / "pod3" / "artifacts" / "decisions" / decision.digest
        assert sorted(p.name for p in (fetched / "groups").iterdir()) == ["00001.parquet"]
        assert not (fetched / "ledger.parquet").exists()
        flow.select_group(decision, CONFIG, 2, 3)
        assert bucket.exists("corpora/nucleus/keys/selections")


@pytest.mark.slow
def test_files_that_are_left_out_later_are_named_and_change_no_curated_digest(tars):
    """Nothing downstream is made again for a file that is no image."""
    before = curate(tars)
    digest = load_manifest(before).digest
    (tars / "photos.zip").write_bytes(b"PK")
    (tars / "notes.docx").write_bytes(b"")
    (Path(os.fsdecode(os.fsencode(tars) + b"/\xff\x1b.xyz"))).write_bytes(b"")
    for junk in (True, False, True):
        if not junk:
            (tars / "photos.zip").rename(tars.parent / "photos.zip")
        elif not (tars / "photos.zip").exists():
            (tars.parent / "photos.zip").rename(tars / "photos.zip")
        curated, decision = flow.curate_source(SOURCE, str(tars), CONFIG)
        assert load_manifest(curated).digest == digest
        directory = fetch_part(decision)
        content = json.loads((directory / "report.json").read_text())
        assert ("1 x .zip (photos.zip)" in content["account"]["left_out"]) == junk
        assert r"1 x .xyz (\udcff\x1b.xyz)" in content["account"]["left_out"]
        for place in (directory, curated):
            assert json.loads((place / "report.json").read_text()) == content
            assert ("photos.zip" in (place / "report.html").read_text()) == junk
        assert ("photos.zip" in flow.result_line(directory, decision, CONFIG)) == junk


def test_a_source_of_one_image_asks_for_its_folder_where_its_caption_is(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("a red barn")
    with pytest.raises(ValueError, match="a.png' is one image; give the folder"):
        flow.write_corpus(SOURCE, str(tmp_path / "a.png"), [], tmp_path / "corpus")
