"""Parts of an artifact: made once for their inputs, found again, and indexed without a copy."""

from __future__ import annotations

import shutil

import pytest
from object_store import s3_bucket

from tasks import store
from tasks.manifest import load_manifest, seal
from tasks.store import Part

pytestmark = pytest.mark.usefixtures("home")


class Maker:
    """Counts how often each content is made."""

    def __init__(self):
        self.calls: list[str] = []

    def part(self, name: str, content: str, version: str = "1") -> Part:
        def make(out):
            self.calls.append(name)
            (out / "data.txt").write_text(content)
            return len(content)

        return store.make_part("scores", name, version, {"content": content}, make)


def test_a_part_is_made_once_for_its_inputs():
    maker = Maker()
    first, again = maker.part("a", "x"), maker.part("a", "x")
    assert first == again and maker.calls == ["a"]
    assert (store.fetch_part(first) / "data.txt").read_text() == "x" and first.rows == 1
    assert maker.part("a", "y") != first and maker.part("a", "x", version="2").digest == first.digest
    assert maker.calls == ["a", "a", "a"]


def test_a_part_that_was_lost_is_made_again(home):
    maker = Maker()
    part = maker.part("a", "x")
    shutil.rmtree(store.fetch_part(part))
    with pytest.raises(FileNotFoundError, match="'a'"):
        store.fetch_part(part)
    assert maker.part("a", "x") == part and maker.calls == ["a", "a"]
    for key in (home / "keys/scores").iterdir():
        key.write_text("broken")
    assert maker.part("a", "x") == part and len(maker.calls) == 3


def test_a_changed_part_is_refused():
    part = Maker().part("a", "x")
    path = store.fetch_part(part)
    (path / "data.txt").write_text("z")
    with pytest.raises(ValueError, match="was changed"):
        store.fetch_part(part)
    for file in path.iterdir():
        file.unlink()
    (path / "data.txt").write_text("z")
    seal(path, "scores")  # whole in itself, but another artifact
    with pytest.raises(ValueError, match="was expected"):
        store.fetch_part(part)


def test_an_index_lists_parts_and_does_not_depend_on_where_they_are_or_who_made_them(tmp_path, monkeypatch):
    digests = []
    for home, execution in (("one", ""), ("two", "f0123456789abcdef")):
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / home))
        monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", execution)
        maker = Maker()
        parts = [maker.part(name, name * 3) for name in "abc"] + [Part("d", "scores", error="unreadable")]

        def write(out, parts=parts):
            return store.write_index(out, parts)

        path, manifest, counts = store.make_sealed("curated", write, logs=(store.LOCATIONS,))
        digests.append(manifest.digest)
        assert list(store.read_index(path)) == parts
        assert counts == {"parts": 3, "failed": 1, "rows": 9, "size_bytes": sum(part.size_bytes for part in parts)}
        assert not store.missing_parts(path)
        shutil.rmtree(store.fetch_part(parts[1]))
        assert store.missing_parts(path) == [parts[1]]
    assert digests[0] == digests[1]
    with pytest.raises(ValueError, match="'a' is there twice"):
        store.write_index(tmp_path, [parts[0], parts[0]])


def test_groups_divide_the_shards_and_number_at_most_what_is_asked():
    for count, limit in ((1, 2000), (7, 3), (70_000, 2000), (0, 5)):
        groups = store.num_groups(count, limit)
        positions = [i for group in range(groups) for i in store.group_range(group, groups, count)]
        assert positions == list(range(count)) and groups <= limit


def test_parts_in_an_object_store_are_shared_by_pods(tmp_path, monkeypatch):
    with s3_bucket("nucleus-parts"):
        monkeypatch.setenv("NUCLEUS_STORE", "s3://nucleus-parts/store")
        maker = Maker()
        part = maker.part("a", "x")
        assert part.uri.startswith("s3://nucleus-parts/store/artifacts/scores/")
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "another pod"))
        assert maker.part("a", "x") == part and maker.calls == ["a"]
        path = store.fetch_part(part)
        assert path.is_relative_to(tmp_path / "another pod") and load_manifest(path).digest == part.digest
