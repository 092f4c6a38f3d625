"""Captions in Flyte: the tasks of workflows/caption.py, where they run, and one real run."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pandas as pd
import pytest
from recipe_home import Home
from test_curation_task import LIMIT, composed

from tasks import envs
from tasks.curation.config import CaptionerConfig, CurationConfig
from tasks.curation.task import caption_group, caption_group_gpu, decide_corpus, draft_corpus, gather_captions
from workflows.caption import caption_source

CAPTIONERS = {
    "openai": CaptionerConfig(name="openai", endpoint="http://captioner:8000/v1", model="m"),
    "qwen3-vl": CaptionerConfig(name="qwen3-vl", model="Qwen/Qwen3-VL-8B-Instruct", revision="0" * 40),
}


def task_of(node) -> str:
    """The name of its task, also of a map over one."""
    name = (node.array_node.node if node.array_node else node).task_node.reference_id.name.rpartition(".")[2]
    return re.sub(r"^map_(\w+)_[0-9a-f]{32}-arraynode$", r"\1", name)


@pytest.fixture(params=CAPTIONERS)
def nodes(request):
    config = CurationConfig(captioner=CAPTIONERS[request.param], concurrency=64, min_success_ratio=0.99)
    with ExitStack() as stack:
        yield request.param, {task_of(node): node for node in stack.enter_context(composed(config, caption_source))}


def bound_to(node, name: str) -> str:
    """The node whose output is an input of this one."""
    (binding,) = [binding for binding in node.inputs if binding.var == name]
    return binding.binding.promise.node_id


def test_captions_follow_the_draft_in_groups_and_are_gathered(nodes):
    captioner, by_task = nodes
    captions = "caption_group_gpu" if captioner == "qwen3-vl" else "caption_group"
    assert list(by_task) == ["make_group", "list_corpus", "score_group", "draft_corpus", captions, "gather_captions"]
    described = by_task[captions]
    assert described.array_node._parallelism == 64 and described.array_node._min_success_ratio == 0.99
    assert bound_to(by_task["draft_corpus"], "scores") == by_task["score_group"].id
    assert bound_to(described, "drafts") == by_task["draft_corpus"].id
    assert bound_to(described, "group") == by_task["list_corpus"].id
    assert bound_to(by_task["gather_captions"], "captions") == described.id


def test_curating_with_a_captioner_decides_about_captions_and_not_about_scores():
    with composed(CurationConfig(captioner=CAPTIONERS["openai"])) as nodes:
        by_task = {task_of(node): node for node in nodes}
    assert bound_to(by_task["decide_corpus"], "scores") == by_task["caption_group"].id
    assert "gather_captions" not in by_task


def test_a_model_in_the_task_gets_a_gpu_and_an_endpoint_gets_none_and_a_week():
    assert caption_group_gpu.resources.requests.gpu == "1" and not caption_group.resources.requests.gpu
    assert caption_group.metadata.timeout == envs.TIMEOUTS["captioner"] > envs.TIMEOUTS["shard"]
    assert draft_corpus.resources.requests == decide_corpus.resources.requests
    assert not gather_captions.resources.requests.gpu


def test_a_prompt_of_each_tier_and_class_keeps_the_composed_workflow_small():
    prompts = {tier: dict.fromkeys(("short", "medium", "long"), "Describe this. " * 40) for tier in ("A1", "A2", "A3")}
    captioner = CAPTIONERS["openai"].model_copy(update={"tier_prompts": prompts})
    with composed(CurationConfig(captioner=captioner), caption_source) as nodes:  # which checks the size of all
        assert sum(node.to_flyte_idl().ByteSize() for node in nodes) < LIMIT / 4


def test_a_recipe_without_a_captioner_is_refused():
    with pytest.raises(Exception, match="the recipe has no captioner"), composed(CurationConfig(), caption_source):
        pass


@pytest.mark.slow
def test_the_command_describes_every_kept_scene_and_curating_afterwards_asks_nothing_again(tmp_path):
    home = Home(tmp_path / "home")
    changes = [
        "source.scenes=24", "source.digits=0", "source.defect_fraction=0", "source.shards=2", "curation.captions.max_words=40",
        "curation.captioner={name: scenes, per_tier: {A1: [short], A2: [short, medium], A3: [short], A4: [short], A5: [short]}}",
        "curation.captioner.lengths={short: {prompt: p, min_words: 2, max_words: 14, max_tokens: 64}, "
        "medium: {prompt: p, min_words: 5, max_words: 40, max_tokens: 64}}",
    ]  # fmt: skip
    options = ["--recipe", "smoke", *(word for change in changes for word in ("--overrides", change))]
    done = home.invoke(*options, workflow="caption")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = sorted((home.artifacts / "captions").glob("*/captions.parquet"))
    captions = pd.concat(map(pd.read_parquet, parts))
    assert len(parts) == 2 and set(captions["captioner"]) == {"", "scenes@1"}
    written = captions[captions["length"] != "original"]
    assert set(written["status"]) == {"ok"} and set(written["length"]) == {"short", "medium"}  # scenes are A2
    assert set(written.groupby("record_id").size()) == {2}
    before = home.listing()
    assert home.invoke(*options, workflow="curate").returncode == 0
    after = home.listing()
    assert after["captions"] <= before["captions"] and after["scores"] == before["scores"]
    (curated,) = after["curated"]
    assert (
        json.loads((home.artifacts / "curated" / curated / "report.json").read_text())["kept"]
        == written["record_id"].nunique()
    )
