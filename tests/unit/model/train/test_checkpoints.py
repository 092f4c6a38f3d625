"""Which checkpoints are read, locally and in S3, and that reading one runs no code in it."""

from __future__ import annotations

import enum
import io
import os
import pickle
import socket
import threading

import pytest
import s3fs
import torch
import torch.distributed.checkpoint as dcp
from botocore.exceptions import EndpointConnectionError
from object_store import s3_bucket
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from model import storage
from model.weights.checkpoints import (
    METADATA,
    CheckpointReader,
    canonical_metadata,
    finished_checkpoints,
    incomplete_files,
    last_checkpoint,
    load,
)
from tasks.training.faults import is_permanent

STATE = {"weight": torch.arange(6.0).view(2, 3), "state": {"step": 7, "half": torch.ones(4, dtype=torch.bfloat16)}}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket of a server of S3's protocol on this machine."""
    with s3_bucket("checkpoints"):
        yield "s3://checkpoints"


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def save(state, path):
    writer = (
        FsspecWriter(path, sync_files=False, **storage.options(path)) if "://" in path else dcp.FileSystemWriter(path)
    )
    dcp.save(state, storage_writer=writer, no_dist=True)


def empty():
    return {"weight": torch.zeros(2, 3), "state": {"step": 0, "half": torch.zeros(4, dtype=torch.bfloat16)}}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_was_saved_is_loaded(place):
    save(STATE, f"{place}/step-3")
    state = empty()
    load(state, f"{place}/step-3", alone=True)
    assert torch.equal(state["weight"], STATE["weight"]) and torch.equal(state["state"]["half"], STATE["state"]["half"])
    assert state["state"]["step"] == 7


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_without_its_metadata_does_not_exist(place):
    assert finished_checkpoints(f"{place}/checkpoints") == {}
    for step in (5, 10, 15):
        save(STATE, f"{place}/checkpoints/step-{step}")
    fs, path = storage.filesystem(f"{place}/checkpoints/step-15/.metadata")
    fs.rm_file(path)
    storage.write_bytes(f"{place}/checkpoints/notes.txt", b"")
    save(STATE, f"{place}/checkpoints/set-aside/step-20")
    assert finished_checkpoints(f"{place}/checkpoints") == {n: f"{place}/checkpoints/step-{n}" for n in (5, 10)}
    assert last_checkpoint(f"{place}/checkpoints") == f"{place}/checkpoints/step-10"
    assert last_checkpoint(f"{place}/checkpoints/step-5") == f"{place}/checkpoints/step-5"
    with pytest.raises(ValueError, match="no finished checkpoint"):
        last_checkpoint(f"{place}/checkpoints/step-15")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_removing_takes_the_metadata_first_and_leaves_nothing(place, monkeypatch):
    save(STATE, f"{place}/step-5")
    fs, path = storage.filesystem(f"{place}/step-5")

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fs, "rm", cut_off)
        with pytest.raises(KeyboardInterrupt):
            storage.remove(f"{place}/step-5")
    assert finished_checkpoints(place) == {} and storage.children(place) == [f"{place}/step-5"]
    storage.remove(f"{place}/step-5")
    storage.remove(f"{place}/step-5")
    assert storage.children(place) == []


def test_a_listing_has_what_another_thread_wrote(place):
    storage.write_bytes(f"{place}/one", b"")
    assert storage.children(place) == [f"{place}/one"]
    other = threading.Thread(target=storage.write_bytes, args=(f"{place}/two", b""))
    other.start()
    other.join()
    assert storage.children(place) == [f"{place}/one", f"{place}/two"]


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    storage.write_bytes(path, b"first")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            storage.write_bytes(path, b"second")
    assert path.read_bytes() == b"first"


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_in_place_of_metadata_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "it_ran"
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Malice(proof)))
    with pytest.raises(ValueError, match=r"names (_?io)\.open, which is not part"):
        CheckpointReader(folder).read_metadata()
    assert not proof.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the pickle works
    assert proof.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_malice_inside_of_metadata_is_refused_too(tmp_path):
    save(STATE, str(tmp_path / "step-1"))
    path = tmp_path / "step-1" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Malice(tmp_path / "it_ran")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not part of a checkpoint's metadata"):
        load(empty(), tmp_path / "step-1", alone=True)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["torch load", "torch.serialization load", "builtins eval", "posix system"])
def test_a_function_that_metadata_never_names_is_refused_whoever_owns_it(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(
        b"c" + name.replace(" ", "\n").encode() + b"\n(tR."
    )  # a call without arguments
    with pytest.raises(ValueError, match=f"names {name.replace(' ', '.')}, which is not part"):
        CheckpointReader(tmp_path).read_metadata()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_what_is_no_metadata_is_one_clear_error(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        CheckpointReader(tmp_path).read_metadata()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_may_not_point_outside_of_its_folder(tmp_path):
    save(STATE, str(tmp_path / "step-1"))
    path = tmp_path / "step-1" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        load(empty(), tmp_path / "step-1", alone=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_malice_among_the_values_is_refused_and_not_run(tmp_path, monkeypatch):
    import torch.distributed.checkpoint.default_planner as planner

    def resolve(self, write_item, value):
        content = io.BytesIO()
        torch.save(Malice(tmp_path / "it_ran"), content)
        return content if write_item.index.fqn == "state.step" else value

    with monkeypatch.context() as patch:
        patch.setattr(planner.DefaultSavePlanner, "transform_object", resolve)
        save(STATE, str(tmp_path / "step-1"))
    with pytest.raises(ValueError, match="state.step is neither a tensor nor a plain value"):
        load(empty(), tmp_path / "step-1", alone=True)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.filterwarnings("error")
def test_loading_gives_no_warning(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(STATE, str(tmp_path / "step-1"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(empty(), tmp_path / "step-1", alone=True)
    assert [str(warning.message) for warning in caught] == []


def test_a_bucket_that_does_not_exist_is_refused_before_any_work(bucket):
    with pytest.raises(ValueError, match="no bucket 'elsewhere'"):
        storage.check_writable_place("s3://elsewhere/run")
    storage.check_writable_place(f"{bucket}/run")
    with pytest.raises(ValueError, match="nowhere://run"):
        storage.check_writable_place("nowhere://run")


def test_an_object_store_that_does_not_answer_is_worth_another_attempt(bucket, monkeypatch):
    with socket.socket() as unanswered:  # nothing listens there
        unanswered.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unanswered.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)  # else the one with the other address is reused
        with pytest.raises(ConnectionError, match="does not answer") as failure:
            storage.check_writable_place(f"{bucket}/run")
    assert not is_permanent(failure.value)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ConnectionResetError("reset by peer"), ConnectionError),
        (EndpointConnectionError(endpoint_url="http://store"), ConnectionError),
        (FileNotFoundError("__0_0.distcp"), ValueError),
        (RuntimeError("PytorchStreamReader failed"), ValueError),
    ],
)
def test_unreadable_checkpoints_are_distinguished_from_damaged_ones(tmp_path, monkeypatch, failure, expected):
    save(STATE, str(tmp_path / "step-1"))

    def read_data(*_):
        raise failure

    monkeypatch.setattr(CheckpointReader, "read_data", read_data)
    with pytest.raises(expected, match="step-1 cannot be loaded: "):
        load({"weight": torch.zeros(2, 3)}, tmp_path / "step-1", alone=True)


def test_equal_checkpoints_have_equal_bytes_however_their_tensors_were_made(tmp_path):
    """DCP writes a random id and the path, and pickle writes an object in memory only once."""
    value = torch.arange(6.0).view(2, 3)
    apart = {"one": value.clone(), "other": value.clone()}
    for name in ("a", "elsewhere"):
        dcp.save(apart if name == "a" else dict(apart), checkpoint_id=tmp_path / name, no_dist=True)
        shape = pickle.loads((tmp_path / name / METADATA).read_bytes())
        if name == "elsewhere":  # as after a resume: two objects instead of one
            shape.state_dict_metadata["one"].size = torch.Size([2, 3])
            (tmp_path / name / METADATA).write_bytes(pickle.dumps(shape))
    linked = tmp_path / "linked"
    os.link(tmp_path / "a" / METADATA, linked)
    files = [tmp_path / name / METADATA for name in ("a", "elsewhere")]
    assert files[0].read_bytes() != files[1].read_bytes()
    before = linked.read_bytes()
    for file in files:
        canonical_metadata(file.parent)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert linked.read_bytes() == before, "a hard link to the run's own file was changed"
    state = {"one": torch.zeros(2, 3), "other": torch.zeros(2, 3)}
    load(state, tmp_path / "elsewhere", alone=True)
    assert torch.equal(state["one"], value) and torch.equal(state["other"], value)


class EarlyPickler(pickle.Pickler):
    """Writes the members of enums as Python 3.11.2 does."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_a_checkpoint_of_an_early_python_3_11_has_the_bytes_of_others_and_is_loaded(tmp_path):
    """Debian 12 has 3.11.2, which pickles an enum's member as a call of getattr."""
    value = torch.arange(6.0).view(2, 3)
    for name in ("early", "late"):
        dcp.save({"weight": value}, checkpoint_id=tmp_path / name, no_dist=True)
    file = tmp_path / "early" / METADATA
    written = io.BytesIO()
    EarlyPickler(written).dump(pickle.loads(file.read_bytes()))
    file.write_bytes(written.getvalue())
    assert b"getattr" in file.read_bytes()
    state = {"weight": torch.zeros(2, 3)}
    load(state, tmp_path / "early", alone=True)
    assert torch.equal(state["weight"], value)
    for name in ("early", "late"):
        canonical_metadata(tmp_path / name)
    assert file.read_bytes() == (tmp_path / "late" / METADATA).read_bytes()


def test_getattr_reads_nothing_but_members_of_metadatas_enums(tmp_path):
    call = b"(ctorch.distributed.checkpoint.metadata\nMetadata\nS'__init__'\ntR."
    (tmp_path / METADATA).write_bytes(b"cbuiltins\ngetattr\n" + call)
    with pytest.raises(ValueError, match="which is not an enum"):
        CheckpointReader(tmp_path).read_metadata()


def test_a_checkpoint_that_was_cut_off_is_noticed_by_its_lengths(tmp_path):
    dcp.save({"weight": torch.rand(100)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert incomplete_files(tmp_path / "step-1") == []
    file = next((tmp_path / "step-1").glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert incomplete_files(tmp_path / "step-1") == [file.name]
    file.unlink()
    assert incomplete_files(tmp_path / "step-1") == [file.name]
    file.write_bytes(whole)
    (tmp_path / "step-1" / METADATA).write_bytes(b"cut")
    assert incomplete_files(tmp_path / "step-1") == [METADATA]


@pytest.mark.parametrize("name", ["__members__", "mro", "_missing_"])
def test_getattr_reads_no_other_attribute_of_an_enum(tmp_path, name):
    call = f"(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nS'{name}'\ntR.".encode()
    (tmp_path / METADATA).write_bytes(b"cbuiltins\ngetattr\n" + call)
    with pytest.raises(ValueError, match=f"'{name}'$"):
        CheckpointReader(tmp_path).read_metadata()
