"""Sealed directories refuse every change, and appear whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tasks import manifest
from tasks.manifest import MANIFEST, load_manifest, seal, verify, writing


def make(directory: Path, files: dict[str, bytes] | None = None, **kwargs) -> Path:
    for name, content in (files or {"a.bin": b"alpha", "sub/b.bin": b"beta"}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    seal(directory, kwargs.pop("kind", "records"), **kwargs)
    return directory


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_sealed_directory_verifies_and_its_manifest_lists_every_file(tmp_path):
    done = make(tmp_path / "x", counts={"records": 2}, config={"seed": 1})
    sealed = verify(done)
    assert set(sealed.files) == {"a.bin", "sub/b.bin"}
    assert sealed.counts == {"records": 2} and sealed.config == {"seed": 1}


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin"])
def test_a_flipped_bit_is_refused_by_name(tmp_path, name):
    done = make(tmp_path / "x")
    content = bytearray((done / name).read_bytes())
    content[-1] ^= 1
    (done / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} was changed"):
        verify(done)


def test_a_missing_file_is_refused_by_name(tmp_path):
    done = make(tmp_path / "x")
    (done / "sub/b.bin").unlink()
    with pytest.raises(ValueError, match="lacks sub/b.bin"):
        verify(done)


@pytest.mark.parametrize("name", ["extra.bin", "sub/.hidden", f"sub/{MANIFEST}"])
def test_an_added_file_is_refused_by_name(tmp_path, name):
    done = make(tmp_path / "x")
    (done / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds {name}"):
        verify(done)


def test_a_link_in_place_of_a_file_is_refused_even_with_the_same_bytes(tmp_path):
    done = make(tmp_path / "x")
    (tmp_path / "elsewhere").write_bytes(b"alpha")
    (done / "a.bin").unlink()
    (done / "a.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a.bin is a symbolic link"):
        verify(done)
    with pytest.raises(ValueError, match="symbolic link"):
        seal(done, "records")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"a.bin": "0" * 64}),
        lambda m: m["config"].update(seed=2),
        lambda m: m["counts"].update(records=3),
        lambda m: m.update(kind="curated"),
        lambda m: m["parents"][0].update(digest="0" * 64),
        lambda m: m["parents"].clear(),
        lambda m: m.update(digest="0" * 64),
    ],
    ids=["files", "config", "counts", "kind", "parent digest", "parents", "digest"],
)
def test_a_changed_manifest_is_refused(tmp_path, change):
    parent = make(tmp_path / "parent")
    done = make(tmp_path / "x", parents=[parent], config={"seed": 1}, counts={"records": 2})
    fields = json.loads((done / MANIFEST).read_text())
    change(fields)
    (done / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{MANIFEST} was changed"):
        verify(done)


def test_a_manifest_that_is_missing_broken_or_of_another_schema_is_refused(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="not a sealed directory"):
        verify(tmp_path / "bare")
    with pytest.raises(ValueError, match="not a sealed directory"):
        verify(tmp_path / "nothing here")
    done = make(tmp_path / "x")
    text = (done / MANIFEST).read_text()
    (done / MANIFEST).write_text(text[:-9])
    with pytest.raises(ValueError, match="is not a manifest"):
        verify(done)
    (done / MANIFEST).write_text(text.replace('"schema_version": 2', '"schema_version": 9'))
    with pytest.raises(ValueError, match="has schema 9"):
        verify(done)


def test_equal_content_has_equal_seals_wherever_and_by_whatever_it_was_made(tmp_path, monkeypatch):
    first = load_manifest(make(tmp_path / "one/x", parents=[make(tmp_path / "p")]))
    monkeypatch.setenv("NUCLEUS_CODE_VERSION", "f" * 40)
    monkeypatch.setenv("FLYTE_INTERNAL_IMAGE", "registry/other:1")
    second = load_manifest(make(tmp_path / "two/y", parents=[make(tmp_path / "q")]))
    assert first.digest == second.digest
    assert second.made_by["image"] == "registry/other:1" and second.made_by["code_version"].endswith("f" * 40)


def test_content_names_kind_config_counts_and_parents_each_change_the_seal(tmp_path):
    parent = make(tmp_path / "parent")
    variants = [
        {},
        {"files": {"a.bin": b"alpha", "sub/b.bin": b"Beta"}},
        {"files": {"a.bin": b"alpha", "sub/c.bin": b"beta"}},
        {"kind": "curated"},
        {"config": {"seed": 1}},
        {"counts": {"records": 1}},
        {"parents": [parent]},
    ]
    digests = {load_manifest(make(tmp_path / str(i), **v)).digest for i, v in enumerate(variants)}
    assert len(digests) == len(variants)


def test_values_that_json_writes_otherwise_still_verify(tmp_path):
    config = {"by_rank": {10: "b", 9: "a"}, "rates": (1e-7, 0.1), "path": None, "not_a_number": float("nan")}
    done = make(tmp_path / "x", config=config, counts={"records": 100.0})
    assert verify(done).config["by_rank"] == {"10": "b", "9": "a"}


def test_a_copy_elsewhere_still_verifies(tmp_path):
    done = make(tmp_path / "x", parents=[make(tmp_path / "parent")])
    copy = shutil.copytree(done, tmp_path / "far/away")
    shutil.rmtree(done)
    shutil.rmtree(tmp_path / "parent")
    assert verify(copy).kind == "records"


def test_sealing_refuses_an_unknown_kind_an_empty_directory_and_an_unsealed_parent(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        seal(tmp_path / "x", "records")
    (tmp_path / "x/a").write_bytes(b"a")
    with pytest.raises(ValueError, match="kind 'rekords' is unknown; use one of urls, records, "):
        seal(tmp_path / "x", "rekords")
    with pytest.raises(ValueError, match="not a sealed directory"):
        seal(tmp_path / "x", "records", parents=[tmp_path])
    assert not (tmp_path / "x" / MANIFEST).exists()


def test_sealing_again_gives_the_same_manifest_and_no_stray_file(tmp_path):
    done = make(tmp_path / "x")
    before = (done / MANIFEST).read_bytes()
    seal(done, "records")
    assert (done / MANIFEST).read_bytes() == before
    assert leftovers(done) == ["a.bin", MANIFEST, "sub"]


def test_writing_shows_nothing_before_the_end_and_everything_after(tmp_path):
    final = tmp_path / "deep/final"
    with writing(final) as out:
        make(out)
        assert not final.exists() and out.parent == final.parent
    verify(final)
    assert leftovers(final.parent) == ["final"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_writing_leaves_nothing_when_the_block_raises_and_keeps_what_was_there(tmp_path, error):
    make(tmp_path / "final", {"old": b"old"})
    for name in ("final", "new"):
        with pytest.raises(type(error)):
            with writing(tmp_path / name) as out:
                (out / "half").write_bytes(b"written")
                raise error
    assert leftovers(tmp_path) == ["final"]
    assert set(verify(tmp_path / "final").files) == {"old"}


def test_writing_refuses_to_show_what_was_not_sealed(tmp_path):
    with pytest.raises(AssertionError, match="without a seal"):
        with writing(tmp_path / "final") as out:
            (out / "a").write_bytes(b"a")
    assert leftovers(tmp_path) == []


def test_writing_replaces_an_older_directory_whole(tmp_path):
    make(tmp_path / "final", {"old": b"old", "both": b"1"})
    with writing(tmp_path / "final") as out:
        make(out, {"new": b"new", "both": b"2"})
    assert set(verify(tmp_path / "final").files) == {"new", "both"}
    assert leftovers(tmp_path) == ["final"]


def test_a_failure_while_replacing_never_leaves_a_part_of_the_older_directory(tmp_path, monkeypatch):
    make(tmp_path / "final", {"old": b"old", "more": b"more"})
    seen = []

    def remove(path, *args, **kwargs):
        final = tmp_path / "final"
        seen.append(set(load_manifest(final).files) if final.exists() else None)

    monkeypatch.setattr(manifest.shutil, "rmtree", remove)  # as if killed before any deletion
    with writing(tmp_path / "final") as out:
        make(out, {"new": b"new"})
    assert seen[0] is None  # deletion began only once the older one had another name
    assert all(state == {"new"} for state in seen[1:])
    assert set(verify(tmp_path / "final").files) == {"new"}


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from tasks.manifest import writing
    with writing(sys.argv[1]) as out:
        (out / "half").write_bytes(b"written")
        print(out, flush=True)
        sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_a_killed_attempt_shows_nothing_and_the_next_one_clears_it_away(tmp_path):
    final = tmp_path / "final"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(final), "kill"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not final.exists() and len(leftovers(tmp_path)) == 1
    with writing(final) as out:
        make(out)
    assert leftovers(tmp_path) == [final.name]


def test_an_attempt_that_still_runs_is_not_cleared_away_by_another(tmp_path):
    final = tmp_path / "final"
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        theirs = Path(other.stdout.readline().strip())
        with writing(final) as out:
            make(out)
        assert (theirs / "half").read_bytes() == b"written"
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    verify(final)


def test_writing_by_digest_names_the_directory_by_its_content_and_keeps_equal_content(tmp_path):
    for _ in range(2):
        with writing(tmp_path / "records", by_digest=True) as out:
            make(out)
            digest = load_manifest(out).digest
    final = manifest.sealed_path(tmp_path / "records", digest)
    assert verify(final).digest == digest and leftovers(tmp_path / "records") == [final.name]
    inode = (final / MANIFEST).stat().st_ino
    with writing(tmp_path / "records", by_digest=True) as out:
        make(out)
    assert (final / MANIFEST).stat().st_ino == inode


def test_writing_by_digest_takes_the_place_of_a_damaged_directory(tmp_path):
    for _ in range(2):
        with writing(tmp_path / "records", by_digest=True) as out:
            digest = load_manifest(make(out)).digest
        final = manifest.sealed_path(tmp_path / "records", digest)
        verify(final)
        (final / "a.bin").write_bytes(b"alphA")
    with pytest.raises(ValueError, match="a.bin was changed"):
        verify(final)


def test_what_one_attempt_has_made_visible_is_not_replaced_by_another_s_equal_content(tmp_path, monkeypatch):
    """It may have readers."""
    folder, real, seen = tmp_path / "records", manifest.verify, []

    def write():
        with writing(folder, by_digest=True) as out:
            digest = load_manifest(make(out)).digest
        seen.append((manifest.sealed_path(folder, digest) / MANIFEST).stat().st_ino)

    other = threading.Thread(target=write)

    def looked(directory, **wanted):
        try:
            return real(directory, **wanted)
        finally:
            if threading.current_thread() is not other:
                other.start()  # between the check and the rename
                other.join(1)

    monkeypatch.setattr(manifest, "verify", looked)
    write()
    other.join()
    assert seen[0] == seen[1] and len(leftovers(folder)) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; skips where it cannot be mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "small"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(os.fsencode(place), 2)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(small_disk):
    with pytest.raises(OSError, match="No space left on device while writing .*final"):
        with writing(small_disk / "final") as out:
            (out / "big").write_bytes(bytes(1 << 20))
    assert leftovers(small_disk) == []
    with writing(small_disk / "final") as out:  # and the place can be used again
        make(out)
    verify(small_disk / "final")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O: No space left on device")]
)
def test_a_disk_that_fills_up_while_sealing_leaves_nothing(tmp_path, monkeypatch, error):
    def full(path):
        raise error

    monkeypatch.setattr(manifest, "_fsync", full)
    with pytest.raises(OSError, match="while writing .*final"):
        with writing(tmp_path / "final") as out:
            make(out)
    assert leftovers(tmp_path) == []


def test_every_file_and_directory_is_fsynced_before_the_rename(tmp_path, monkeypatch):
    synced: list[str] = []
    real = manifest._fsync
    monkeypatch.setattr(manifest, "_fsync", lambda path: (synced.append(Path(path).name), real(path)))
    with writing(tmp_path / "final") as out:
        make(out, {"a.bin": b"a", "sub/deep/b.bin": b"b"})
        assert {"a.bin", "b.bin", "sub", "deep", out.name} <= set(synced)
        assert any(name.startswith(f".{MANIFEST}.") for name in synced)
    assert synced[-1] == tmp_path.name


def test_logs_are_checksummed_but_do_not_change_the_digest(tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    for directory, log, content in ((first, "one", "x"), (second, "two", "x"), (third, "one", "y")):
        (directory / "logs").mkdir(parents=True)
        (directory / "logs/train.txt").write_text(log)
        (directory / "weights.bin").write_text(content)
        seal(directory, "checkpoints", logs=("logs/*",))
    digests = [load_manifest(directory).digest for directory in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]
    assert set(load_manifest(first).logs) == {"logs/train.txt"}
    (first / "logs/train.txt").write_text("changed")
    with pytest.raises(ValueError, match="train.txt was changed"):
        verify(first)


def test_a_changed_location_or_maker_is_noticed(tmp_path):
    done = make(tmp_path / "x", parents=[make(tmp_path / "p")])
    for change in (
        lambda m: m["parents"][0].update(uri="s3://elsewhere"),
        lambda m: m["made_by"].update(image="forged"),
    ):
        fields = json.loads((done / MANIFEST).read_text())
        change(fields)
        with pytest.raises(ValueError, match="was changed"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            for file in done.rglob("*"):
                if file.is_file():
                    (tmp_path / "copy" / file.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / "copy" / file.relative_to(done)).write_bytes(file.read_bytes())
            (tmp_path / "copy" / MANIFEST).write_text(json.dumps(fields))
            verify(tmp_path / "copy")


def test_a_directory_of_another_kind_or_digest_is_refused(tmp_path):
    done = make(tmp_path / "x")
    assert verify(done, kind="records", digest=load_manifest(done).digest)
    with pytest.raises(ValueError, match="'latents' is needed"):
        verify(done, kind="latents")
    with pytest.raises(ValueError, match="was expected"):
        verify(done, digest="0" * 64)


def test_a_planted_directory_does_not_replace_the_artifact_that_is_made(tmp_path):
    """Another self-consistent directory under our digest's name is moved away, not returned."""
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "a.bin").write_text("malicious")
    seal(planted, "records")
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "a.bin").write_text("real")
    digest = seal(reference, "records").digest
    place = manifest.sealed_path(tmp_path / "records", digest)
    place.parent.mkdir()
    planted.rename(place)
    with writing(tmp_path / "records", by_digest=True) as out:
        (out / "a.bin").write_text("real")
        seal(out, "records")
    assert verify(place, digest=digest) and (place / "a.bin").read_text() == "real"
