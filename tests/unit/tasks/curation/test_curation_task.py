"""Curation in Flyte: few sub-tasks, small literals, settings of the recipe."""

from __future__ import annotations

import contextlib

import pytest
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.context_manager import ExecutionState, FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.core.types import BlobType
from flytekit.models.literals import Blob, BlobMetadata, Literal, LiteralCollection, Scalar

from tasks import store
from tasks.curation.config import CurationConfig, ScorerConfig, SourceConfig
from tasks.curation.task import score_group, score_group_on_gpu
from workflows.curate import curate_source

SHARDS, LIMIT = 70_000, 2 * 2**20
ROLES = ("curation", "scorer", "encoder", "trainer", "evaluator", "publisher")


@pytest.fixture
def nodes():
    with composed(CurationConfig(concurrency=64, min_success_ratio=0.99)) as nodes:
        yield nodes


@contextlib.contextmanager
def composed(config: CurationConfig, workflow=curate_source):
    """The nodes of a dynamic workflow as a cluster composes them, for a made source of 70,000 shards."""
    default = Image("default", "registry/image", "tag")
    images = ImageConfig(default_image=default, images=[default, *(Image(r, f"registry/{r}", "tag") for r in ROLES)])
    settings = SerializationSettings(project="p", domain="d", version="v", image_config=images, env={})
    inputs = {
        "source": SourceConfig(scenes=SHARDS, shards=SHARDS),
        "path": "",
        "config": config,
    }
    ctx = FlyteContextManager.current_context()
    with (
        FlyteContextManager.with_context(ctx.with_serialization_settings(settings)) as ctx,
        FlyteContextManager.with_context(
            ctx.with_execution_state(ctx.execution_state.with_params(mode=ExecutionState.Mode.TASK_EXECUTION))
        ) as ctx,
    ):
        literals = TypeEngine.dict_to_literal_map(ctx, inputs, {name: type(value) for name, value in inputs.items()})
        workflow._wf = None  # flytekit composes a dynamic workflow once in a process
        spec = workflow.dispatch_execute(ctx, literals)
        assert spec.to_flyte_idl().ByteSize() < LIMIT
        yield spec.nodes


def test_the_recipe_says_how_many_sub_tasks_run_at_a_time_and_how_many_may_fail(nodes):
    mapped = [(node.array_node._parallelism, node.array_node._min_success_ratio) for node in nodes if node.array_node]
    assert mapped == [(64, 1.0), (64, 0.99), (64, 1.0)]  # make, score, select


def test_a_scorer_that_asks_for_a_gpu_gets_a_map_task_with_one_after_those_on_cpus(nodes):
    model = {"name": "image-text-embedding", "repo_id": "a/b", "revision": "0123456789" * 4}
    with composed(CurationConfig(scorers=ScorerConfig(embedding=model))) as more:
        assert sum(node.array_node is not None for node in more) == 1 + sum(
            node.array_node is not None for node in nodes
        )
        (waiting,) = [node for node in more if any(binding.var == "scored" for binding in node.inputs)]
        assert waiting.array_node is not None
    assert score_group_on_gpu.resources.requests.gpu == "1" and not score_group.resources.requests.gpu


def test_seventy_thousand_shards_are_made_in_two_thousand_sub_tasks(nodes):
    (group,) = [binding for binding in nodes[0].inputs if binding.var == "group"]
    assert len(group.binding.collection.bindings) == 2000


def test_seventy_thousand_shards_are_two_thousand_groups_whose_literals_are_small():
    groups = list(range(store.num_groups(SHARDS, CurationConfig().max_groups)))
    assert len(groups) == 2000
    members = [i for group in groups for i in store.group_range(group, len(groups), SHARDS)]
    assert members == list(range(SHARDS))
    ctx = FlyteContextManager.current_context()
    literal = TypeEngine.to_literal(ctx, groups, list[int], TypeEngine.to_literal_type(list[int]))
    assert literal.to_flyte_idl().ByteSize() < LIMIT
    # The outputs of a map task: a directory for each group, with a long URI and the hash of its content.
    kind = BlobMetadata(BlobType("", BlobType.BlobDimensionality.MULTIPART))
    uri = "s3://" + "x" * 300
    directories = [Literal(scalar=Scalar(blob=Blob(kind, f"{uri}{i}")), hash="0" * 64) for i in groups]
    assert Literal(collection=LiteralCollection(directories)).to_flyte_idl().ByteSize() < LIMIT
