"""A crafted `.metadata` changes nothing in this process (finding F11)."""

from __future__ import annotations

import importlib
import pathlib
import pickle

import pytest
import torch

from model.weights import checkpoints
from model.weights.checkpoints import CheckpointReader

ALLOWED = [(module, name) for module, names in checkpoints._CLASSES.items() for name in sorted(names)]
ALLOWED += [("torch", "float32"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath")]
MEMBER = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def with_build(start: bytes, state: bytes) -> bytes:
    """A pickle that puts `state` on what `start` makes."""
    return b"\x80\x02" + start + state + b"b."


# As `__dict__` items, and as slots, which setattr writes: the second form changes a class permanently.
STATES = {
    "items": b"}U\x06hackedU\x03yess",
    "slots": b"N}U\x06hackedU\x03yess\x86",
    "hash": b"N}U\x08__hash__U\x03yess\x86",
}


def snapshot(thing) -> dict:
    return dict(getattr(thing, "__dict__", {}))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("module", "name"), ALLOWED)
def test_build_on_an_allowed_class_changes_nothing(tmp_path, module, name, state):
    thing = getattr(importlib.import_module(module), name)
    before = snapshot(thing)
    (tmp_path / ".metadata").write_bytes(with_build(name_of(module, name), STATES[state]))
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        CheckpointReader(tmp_path).read_metadata()
    assert snapshot(thing) == before and not hasattr(thing, "hacked")


@pytest.mark.parametrize("state", STATES)
def test_build_on_a_member_of_an_enum_changes_nothing(tmp_path, state):
    kind = getattr(importlib.import_module(MEMBER[0]), MEMBER[1])
    before = {member: snapshot(member) for member in kind}
    start = name_of(*MEMBER) + b"K\x00\x85R"  # the member of value 0
    (tmp_path / ".metadata").write_bytes(with_build(start, STATES[state]))
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        CheckpointReader(tmp_path).read_metadata()
    assert {member: snapshot(member) for member in kind} == before


def test_no_class_of_pathlib_is_made(tmp_path):
    place = pickle.dumps(pathlib.PurePosixPath("/a/b"))
    read = checkpoints._MetadataUnpickler(checkpoints.io.BytesIO(place)).load()
    assert type(read) is str and read.endswith("a/b")


def test_metadata_that_names_a_path_is_still_read(tmp_path):
    """DCP writes the path that it saved to, as a pathlib object if it got one."""
    torch.distributed.checkpoint.save({"a": torch.arange(3)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    content = pickle.loads((tmp_path / "step-1/.metadata").read_bytes())
    content.storage_meta.checkpoint_id = tmp_path / "step-1"
    (tmp_path / "step-1/.metadata").write_bytes(pickle.dumps(content))
    metadata = CheckpointReader(tmp_path / "step-1").read_metadata()
    assert set(metadata.state_dict_metadata) == {"a"}
    state = {"a": torch.zeros(3, dtype=torch.int64)}
    checkpoints.load(state, tmp_path / "step-1", alone=True)
    assert state["a"].tolist() == [0, 1, 2]
