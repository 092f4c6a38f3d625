"""What is said of a source before any work."""

from __future__ import annotations

import pytest

from tasks.planning.source import check_source, fingerprint
from tasks.recipe import load_recipe


def test_a_placeholder_is_refused_without_a_look_at_it_and_both_ways_out_are_named():
    with pytest.raises(ValueError, match="source.path='s3://YOUR-BUCKET/.*placeholder.* --source .*or set source.path"):
        check_source(load_recipe("nucleus_17b").source.path, local=False)


def test_a_path_of_ones_own_machine_is_refused_on_a_cluster_alone():
    for path in ("images/", ""):
        check_source(path, local=True)
    check_source("s3://bucket/images/", local=False)
    check_source("", local=False)
    with pytest.raises(ValueError, match="'images/' is a path of your machine"):
        check_source("images/", local=False)


def test_fingerprint_knows_the_home_directory_and_a_single_files_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"one")
    first = fingerprint("~/a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert fingerprint("~/b.png") != first


def test_fingerprint_follows_content_and_names(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    (tmp_path / "a.png").write_bytes(b"two")
    second = fingerprint(str(tmp_path))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({first, second, fingerprint(str(tmp_path))}) == 3


def test_fingerprint_passes_over_what_the_scan_passes_over(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"one")
    first = fingerprint(str(tmp_path))
    (tmp_path / ".cache").mkdir()
    for name in (".DS_Store", "sub/.a.png.swp", ".cache/b.png"):
        (tmp_path / name).write_bytes(b"noise")
    assert fingerprint(str(tmp_path)) == first
    (tmp_path / "sub" / "b.png").write_bytes(b"two")
    assert fingerprint(str(tmp_path)) != first


def test_fingerprint_refuses_a_source_without_images_in_words(tmp_path):
    with pytest.raises(ValueError, match="has no image; left out: nothing; give a folder of images"):
        fingerprint(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        fingerprint(str(tmp_path / "gone"))
