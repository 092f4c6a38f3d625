"""Official prompts are downloaded once, at a commit, and refused if their digest differs."""

from __future__ import annotations

import hashlib
import json

import pytest

from eval import catalog
from eval.benchmarks import benchmark_data
from eval.benchmarks.base import Source
from eval.benchmarks.benchmark_data import download
from eval.benchmarks.geneval import GenEval
from eval.benchmarks.registry import BENCHMARKS
from eval.config import EvalConfig

PROMPT = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}
CONTENT = (json.dumps(PROMPT) + "\n").encode()


@pytest.fixture
def geneval(monkeypatch):
    """GenEval's source, with a file made by this test."""
    source = Source("a/b", "f" * 40, {"prompts.jsonl": hashlib.sha256(CONTENT).hexdigest()}, "prompts.jsonl")
    monkeypatch.setattr(GenEval, "source", source)
    return source


def test_a_file_is_downloaded_once_at_its_commit(geneval, tmp_path):
    urls = []

    def read(url):
        urls.append(url)
        return CONTENT

    path = download(geneval, tmp_path, read)
    assert path.read_bytes() == CONTENT == download(geneval, tmp_path, read).read_bytes()
    assert urls == [f"https://raw.githubusercontent.com/a/b/{'f' * 40}/prompts.jsonl"]


def test_another_file_under_the_same_name_is_refused_whether_downloaded_or_kept(geneval, tmp_path):
    with pytest.raises(ValueError, match=r"https://raw.* has the SHA-256 .*, and the benchmark's file has"):
        download(geneval, tmp_path, lambda _: b"other")
    assert not list(tmp_path.rglob("*.jsonl"))
    download(geneval, tmp_path, lambda _: CONTENT).write_bytes(b"edited")
    with pytest.raises(ValueError, match="has the SHA-256"):
        download(geneval, tmp_path, lambda _: CONTENT)


def test_without_a_network_the_error_says_what_to_set(geneval, tmp_path):
    def read(url):
        raise OSError("no route to host")

    with pytest.raises(
        ValueError, match=r"cannot be downloaded from https.*no route.*set prompts_file to prompts.jsonl"
    ):
        download(geneval, tmp_path, read)


def test_prompts_without_a_file_are_the_downloaded_ones(geneval, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path))
    monkeypatch.setattr(benchmark_data, "read_url", lambda _: CONTENT)
    (prompt,) = catalog.prompts(EvalConfig(benchmark="geneval"))
    assert prompt == {"id": "00000", **PROMPT}


def test_every_source_has_a_whole_commit_and_its_benchmark():
    sources = {name: benchmark.source for name in BENCHMARKS if (benchmark := catalog.benchmark(name)).source}
    assert sources.keys() == BENCHMARKS.keys() - {"shapes", "captions"}  # made here, and of the user's corpus
    for name, source in sources.items():
        assert catalog.benchmark(name).data and len(source.commit) == 40 and source.files
        short = catalog.benchmark(name).version.partition("@")[2]
        assert source.commit.startswith(short)
    english, chinese = sources["oneig"].files, sources["oneig-zh"].files
    assert len(english) == 7 and len(chinese) == 8 and set(english) & set(chinese) == {"scripts/style/style.csv"}


def test_genevals_development_prompts_are_other_draws_of_its_six_tasks():
    config = EvalConfig(benchmark="geneval", prompt_set="development")
    prompts = catalog.prompts(config)
    tags = [prompt["tag"] for prompt in prompts]
    assert {tag: tags.count(tag) for tag in dict.fromkeys(tags)} == {
        "single_object": 80, "two_object": 100, "counting": 100, "colors": 100, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert len({prompt["prompt"] for prompt in prompts}) == len(prompts)
    assert catalog.prompts(config) == prompts
    for prompt in prompts:
        classes = [clause["class"] for clause in prompt["include"]]
        assert all(name in catalog.benchmark("geneval").classes for name in classes)
        assert all(word in prompt["prompt"] for word in classes)
        assert not any(c["class"] == "person" and "color" in c for c in prompt["include"])
        for clause in prompt.get("exclude", ()):
            assert clause["count"] == prompt["include"][0]["count"] + 1
