"""A push to the Hub verifies a directory, uploads every file, and checks that all arrived."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.utils import HfHubHTTPError, LocalTokenNotFoundError
from sealed_pipelines import make

from tasks.manifest import seal
from tasks.publishing.config import PublishConfig
from tasks.publishing.hub import push
from tasks.publishing.publish import upload


class FakeHub:
    """HfApi on a repository in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, dict]] = []
        self.private, self.sha = True, "0" * 40
        self.lose: str | None = None
        self.change: str | None = None
        self.error: Exception | None = None

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        if options["parent_commit"] != self.sha:
            raise HfHubHTTPError("conflict", response=httpx.Response(412, request=httpx.Request("POST", "https://hub")))
        for name in options["delete_patterns"] or ():
            del self.files[name]
        folder = Path(options["folder_path"])
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()
        self.files.pop(self.lose, None)
        if self.change:
            self.files[self.change] = self.files[self.change][::-1]
        self.sha = "1" * 40
        return SimpleNamespace(oid=self.sha)

    def repo_info(self, repo_id, **options):
        self.calls.append(("info", options))
        return SimpleNamespace(sha=self.sha, private=self.private)

    def hf_hub_download(self, repo_id, name, **options):
        path = Path(tempfile.mkdtemp()) / name
        path.write_bytes(self.files[name])
        return str(path)

    def list_repo_tree(self, repo_id, **options):
        assert options["revision"] == self.sha and options["recursive"]
        yield SimpleNamespace(path="sub", tree_id="x")
        for name, content in self.files.items():
            large = name.endswith(".safetensors")
            lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if large else None
            yield SimpleNamespace(path=name, blob_id="x", size=len(content), lfs=lfs)


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return make(tmp_path / "pipeline", {"README.md": "card", "sub/model.safetensors": b"weights"})


def test_a_push_has_every_file_and_the_manifest_and_its_message_the_digest(pipeline):
    hub = FakeHub()
    report = push(pipeline, "me/model", api=hub)
    assert set(hub.files) == {"README.md", "sub/model.safetensors", "manifest.json"}
    upload = dict(hub.calls)["upload"]
    assert report["digest"] in upload["commit_message"]
    assert report["commit"] == "1" * 40 and report["files"] == 3 and report["url"].endswith("/me/model")


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_made_private_or_public_as_asked_and_may_exist(pipeline, private):
    hub = FakeHub()
    push(pipeline, "me/model", private=private, api=hub)
    create = dict(hub.calls)["create"]
    assert create["private"] is private and create["exist_ok"] is True


def test_a_repository_is_private_unless_asked_otherwise(pipeline):
    hub = FakeHub()
    push(pipeline, "me/model", api=hub)
    assert dict(hub.calls)["create"]["private"] is True


def test_a_push_goes_to_the_branch_of_the_recipe_and_to_no_other(pipeline, monkeypatch):
    hub = FakeHub()
    report = push(pipeline, "me/model", api=hub, revision="candidate")
    calls = dict(hub.calls)
    assert calls["branch"] == {"repo_id": "me/model", "branch": "candidate", "repo_type": "model", "exist_ok": True}
    assert calls["info"]["revision"] == calls["upload"]["revision"] == "candidate"
    assert report["url"].endswith("/me/model/tree/candidate")
    main = FakeHub()
    push(pipeline, "me/model", api=main)
    assert "branch" not in dict(main.calls) and dict(main.calls)["upload"]["revision"] is None
    asked = {}
    monkeypatch.setattr("tasks.publishing.hub.push", lambda *_, **options: asked.update(options))
    upload(pipeline, PublishConfig(hub_repo_id="me/model", hub_revision="candidate"))
    assert asked["revision"] == "candidate"


def test_a_name_without_owner_gets_the_one_that_the_hub_gives(pipeline):
    assert push(pipeline, "model", api=FakeHub())["repo_id"] == "me/model"


def test_a_second_push_deletes_what_only_the_first_had_and_nothing_else(pipeline, tmp_path):
    hub = FakeHub()
    hub.files[".gitattributes"] = b"* lfs"
    push(pipeline, "me/model", api=hub)
    hub.files["discussion.md"] = b"by a user"
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "README.md").write_text("new card")
    seal(newer, "pipeline")
    push(newer, "me/model", api=hub)
    assert set(hub.files) == {".gitattributes", "README.md", "manifest.json", "discussion.md"}


def test_a_repository_with_other_files_is_refused_untouched(pipeline):
    hub = FakeHub()
    hub.files["weights.bin"] = b"of somebody else"
    with pytest.raises(ValueError, match="holds 1 files, such as weights.bin"):
        push(pipeline, "me/model", api=hub)
    hub.files["manifest.json"] = b"{}"
    with pytest.raises(ValueError, match="is not of a push like this one"):
        push(pipeline, "me/model", api=hub)
    assert set(hub.files) == {"weights.bin", "manifest.json"}


def test_a_public_repository_is_refused_if_the_recipe_wants_a_private_one(pipeline):
    hub = FakeHub()
    hub.private = False
    with pytest.raises(ValueError, match="is public, and publish.hub_private is true"):
        push(pipeline, "me/model", api=hub)
    assert not hub.files
    push(pipeline, "me/model", private=False, api=hub)


def test_a_commit_of_somebody_else_meanwhile_is_one_message(pipeline):
    hub = FakeHub()
    looked = hub.repo_info

    def stale(*args, **options):
        info = looked(*args, **options)
        hub.sha = "2" * 40
        return info

    hub.repo_info = stale
    hub.list_repo_tree = lambda *args, **options: iter(())
    with pytest.raises(ValueError, match="changed by another commit meanwhile"):
        push(pipeline, "me/model", api=hub)


def test_the_pushed_manifest_names_no_place(pipeline, tmp_path):
    hub = FakeHub()
    child = tmp_path / "child"
    child.mkdir()
    (child / "README.md").write_text("card")
    seal(child, "pipeline", parents=[pipeline])
    push(child, "me/model", api=hub)
    assert str(tmp_path) not in hub.files["manifest.json"].decode()


def test_a_damaged_directory_is_not_pushed(pipeline):
    (pipeline / "README.md").write_text("cart")
    hub = FakeHub()
    with pytest.raises(ValueError, match="README.md was changed"):
        push(pipeline, "me/model", api=hub)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["README.md", "sub/model.safetensors", "manifest.json"])
def test_a_file_that_did_not_arrive_is_named(pipeline, name):
    hub = FakeHub()
    hub.lose = name
    with pytest.raises(ValueError, match=f"lacks {name}"):
        push(pipeline, "me/model", api=hub)


def test_weights_that_arrived_changed_are_named(pipeline):
    hub = FakeHub()
    hub.change = "sub/model.safetensors"
    with pytest.raises(ValueError, match="another sub/model.safetensors"):
        push(pipeline, "me/model", api=hub)


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/mo del", "-x", "me/" + "x" * 100])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_sent(pipeline, repo_id):
    hub = FakeHub()
    with pytest.raises(ValueError):
        push(pipeline, repo_id, api=hub)
    assert hub.calls == []


def test_a_missing_or_refused_token_is_one_message_that_says_what_to_do(pipeline):
    hub = FakeHub()
    hub.error = LocalTokenNotFoundError("no token")
    with pytest.raises(ValueError, match="set HF_TOKEN or run"):
        push(pipeline, "me/model", api=hub)
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    hub.error = HfHubHTTPError("401", response=httpx.Response(401, request=request))
    with pytest.raises(ValueError, match="refuses to write to me/model .401.*HF_TOKEN"):
        push(pipeline, "me/model", api=hub)


def test_a_planted_token_is_in_no_file_message_or_manifest(pipeline, monkeypatch, capsys):
    tokens = {"HF_TOKEN": "hf_c0ffee1d", "AWS_SECRET_ACCESS_KEY": "aws_c0ffee1d", "WANDB_API_KEY": "wandb_c0ffee1d"}
    for name, value in tokens.items():
        monkeypatch.setenv(name, value)
    (pipeline / "manifest.json").unlink()
    seal(pipeline, "pipeline", config={"publish": {"hub_repo_id": "me/model"}})
    hub = FakeHub()
    report = push(pipeline, "me/model", api=hub)
    said = capsys.readouterr()
    everything = [str(report), str(hub.calls), said.out, said.err]
    everything += [content.decode() for content in hub.files.values()]
    everything += [path.read_text() for path in pipeline.rglob("*") if path.is_file()]
    assert not [text for text in everything if "c0ffee1d" in text]
