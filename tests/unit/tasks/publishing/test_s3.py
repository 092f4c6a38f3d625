"""An upload to S3 never looks complete before it is, goes on where it stopped, and holds exactly the directory."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from tasks.manifest import MANIFEST, seal, verify
from tasks.publishing import s3

BUCKET = "nucleus-artifacts-eu-west-1"
URI = f"s3://{BUCKET}/nucleus/pipeline"
PREFIX = "nucleus/pipeline/"


@pytest.fixture
def client(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FLYTE_AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        client = boto3.client("s3", region_name="eu-west-1")
        client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        yield client


def make(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    seal(directory, "pipeline")
    return directory


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return make(tmp_path / "pipeline", {"README.md": b"card", "transformer/model.safetensors": b"w" * 1000})


def objects(client, prefix: str = PREFIX) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in listed
    }


def download(client, directory: Path) -> Path:
    for name, content in objects(client).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


class Recorder:
    """A client that notes what is written, in order, and can fail at an upload or damage one."""

    def __init__(self, client, fail_at: str = "", damage: str = "") -> None:
        self._client, self.fail_at, self.damage = client, fail_at, damage
        self.written: list[str] = []

    def __getattr__(self, name):
        return getattr(self._client, name)

    def upload_file(self, path, bucket, key, **options):
        if self.fail_at and key.endswith(self.fail_at):
            raise ConnectionError("the line went dead")
        self.written.append(f"put {key.removeprefix(PREFIX)}")
        if self.damage and key.endswith(self.damage):
            content = b"!" + Path(path).read_bytes()[1:]
            self._client.put_object(Bucket=bucket, Key=key, Body=content, **options["ExtraArgs"])
            return
        self._client.upload_file(path, bucket, key, **options)

    def delete_object(self, Bucket, Key):
        self.written.append(f"delete {Key.removeprefix(PREFIX)}")
        return self._client.delete_object(Bucket=Bucket, Key=Key)


def test_what_is_uploaded_can_be_downloaded_and_verifies(client, pipeline, tmp_path):
    report = s3.upload(pipeline, URI, client)
    assert report["uploaded"] == 3 and report["skipped"] == 0 and report["uri"] == URI + "/"
    assert verify(download(client, tmp_path / "back")).digest == verify(pipeline).digest == report["digest"]


def test_the_default_client_is_boto3s_own(client, pipeline):
    assert s3.upload(pipeline, URI)["uploaded"] == 3
    assert set(objects(client)) == {"README.md", "transformer/model.safetensors", MANIFEST}


def test_the_manifest_is_the_last_to_appear(client, pipeline):
    recorder = Recorder(client)
    s3.upload(pipeline, URI, recorder)
    assert recorder.written[-1] == f"put {MANIFEST}" and len(recorder.written) == 3


def test_a_half_uploaded_directory_has_no_manifest_and_the_next_run_goes_on_from_there(client, pipeline):
    with pytest.raises(ConnectionError):
        s3.upload(pipeline, URI, Recorder(client, fail_at="model.safetensors"))
    assert set(objects(client)) == {"README.md"}
    recorder = Recorder(client)
    report = s3.upload(pipeline, URI, recorder)
    assert recorder.written == ["put transformer/model.safetensors", f"put {MANIFEST}"]
    assert (report["uploaded"], report["skipped"]) == (2, 1)


def test_running_it_again_writes_nothing(client, pipeline):
    s3.upload(pipeline, URI, client)
    recorder = Recorder(client)
    report = s3.upload(pipeline, URI, recorder)
    assert recorder.written == [] and (report["uploaded"], report["skipped"], report["bytes"]) == (0, 3, 0)


def test_an_object_of_the_same_length_with_other_bytes_is_replaced(client, pipeline):
    client.put_object(Bucket=BUCKET, Key=PREFIX + "README.md", Body=b"cart")
    s3.upload(pipeline, URI, client)
    assert objects(client)["README.md"] == b"card"


def test_another_version_replaces_the_older_one_whole_and_never_under_its_manifest(client, pipeline, tmp_path):
    s3.upload(pipeline, URI, client)
    other = make(tmp_path / "other", {"README.md": b"new!", "vae/model.safetensors": b"v" * 10})
    recorder = Recorder(client, fail_at="vae/model.safetensors")
    with pytest.raises(ConnectionError):
        s3.upload(other, URI, recorder)
    assert recorder.written[0] == f"delete {MANIFEST}"
    assert MANIFEST not in objects(client)
    s3.upload(other, URI, client)
    assert set(objects(client)) == {"README.md", "vae/model.safetensors", MANIFEST}
    verify(download(client, tmp_path / "back"))


def test_an_interrupted_version_leaves_nothing_behind_in_the_next_one(client, pipeline, tmp_path):
    with pytest.raises(ConnectionError):
        s3.upload(pipeline, URI, Recorder(client, fail_at=MANIFEST))
    other = make(tmp_path / "other", {"README.md": b"new!"})
    assert s3.upload(other, URI, client)["removed"] == 1
    assert set(objects(client)) == {"README.md", MANIFEST}


def test_somebody_elses_objects_are_never_touched(client, pipeline):
    client.put_object(Bucket=BUCKET, Key=PREFIX + "thesis.pdf", Body=b"years of work")
    with pytest.raises(ValueError, match="thesis.pdf is not of an upload like this one; choose an empty prefix"):
        s3.upload(pipeline, URI, client)
    assert set(objects(client)) == {"thesis.pdf"}


def test_neighbours_whose_prefix_begins_alike_are_not_looked_at(client, pipeline):
    client.put_object(Bucket=BUCKET, Key="nucleus/pipeline-2/x", Body=b"x")
    s3.upload(pipeline, URI, client)
    assert objects(client, "nucleus/pipeline-2/") == {"x": b"x"}


def test_a_damaged_directory_is_not_uploaded(client, pipeline):
    (pipeline / "README.md").write_bytes(b"cart")
    with pytest.raises(ValueError, match="README.md was changed"):
        s3.upload(pipeline, URI, client)
    assert objects(client) == {}


def test_an_object_that_arrived_changed_is_refused_and_no_manifest_follows(client, pipeline):
    with pytest.raises(ValueError, match="model.safetensors has the checksum"):
        s3.upload(pipeline, URI, Recorder(client, damage="model.safetensors"))
    assert MANIFEST not in objects(client)


def test_large_files_go_in_parts_and_are_checked_as_such(client, tmp_path):
    content = b"".join(hashlib.sha256(bytes([i])).digest() * 1024 for i in range(200)) * 2  # 12.5 MiB
    directory = make(tmp_path / "large", {"model.safetensors": content})
    s3.upload(directory, URI, client, part_bytes=5 * s3.MIB)
    head = client.head_object(Bucket=BUCKET, Key=PREFIX + "model.safetensors")
    assert head["ETag"].strip('"').endswith("-3") and head["ContentLength"] == len(content)
    assert objects(client)["model.safetensors"] == content


@pytest.mark.parametrize("size", [1, 4096, 4097, 10000])
def test_the_checksum_of_parts_is_that_of_their_digests(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "x").write_bytes(content)
    parts = [content[i : i + 4096] for i in range(0, size, 4096)]
    want = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    assert s3._composite(tmp_path / "x", 4096) == base64.b64encode(want).decode()


@pytest.mark.parametrize("uri", ["s3://", "http://bucket/x", "bucket/x", "s3:///x"])
def test_something_that_is_no_s3_uri_is_refused(pipeline, uri):
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        s3.upload(pipeline, uri)


def test_a_bucket_that_is_not_there_is_named(client, pipeline):
    with pytest.raises(ValueError, match="there is no bucket 'nucleus-missing'"):
        s3.upload(pipeline, "s3://nucleus-missing/x", client)


def test_missing_credentials_are_one_message(pipeline, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FLYTE_AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with pytest.raises(ValueError, match=f"{URI}: Unable to locate credentials"):
        s3.upload(pipeline, URI)


def test_the_manifest_there_names_the_files_there(client, pipeline):
    s3.upload(pipeline, f"s3://{BUCKET}", client)  # a whole bucket is a place as well
    there = objects(client, "")
    assert set(json.loads(there[MANIFEST])["files"]) | {MANIFEST} == set(there)
