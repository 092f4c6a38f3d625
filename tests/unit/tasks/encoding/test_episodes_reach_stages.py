"""An episode of the recipe, and lengths of captions, from the selection of images to what a stage draws."""

from __future__ import annotations

import numpy as np
import pytest
from selected import scenes, write_tar
from test_encode import encode

from model.data.latents import LatentDataset
from model.data.order import SampleOrder
from model.stages import training_stages
from tasks.curation import flow
from tasks.curation.config import CurationConfig, EpisodeConfig, FilterConfig, SourceConfig, TierConfig
from tasks.curation.curated import open_curated
from tasks.encoding.open_latents import open_latents
from tasks.recipe import load_recipe

WIDE = EpisodeConfig(name="wide", where="width > height")
CURATION = CurationConfig(
    filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05), tiers=TierConfig(accept_proxy=True), buckets=(WIDE,)
)


def order_of(overrides: list[str], dataset: LatentDataset, latents_dir) -> SampleOrder:
    """The order in which the first stage of smoke, with overrides, draws: the settings of its data loader."""
    from model.train.config import trainer_config

    recipe = load_recipe("smoke", ["curation.buckets=[{name: wide, where: width > height}]", *overrides])
    stage = training_stages(recipe.model, recipe.train)[0]
    loader = trainer_config(stage, latents_dir=latents_dir, work_dir=latents_dir, init_from=None, ranks=1).dataloader
    return SampleOrder(
        dataset,
        loader.global_batch_size,
        loader.seed,
        loader.tier_weights,
        loader.caption_dropout,
        loader.episode_weights,
        loader.caption_weights,
    )


@pytest.mark.slow
def test_an_episode_of_weight_0_is_never_drawn_and_captions_by_the_weight_of_their_length(
    components, tmp_path, monkeypatch
):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    write_tar(tmp_path / "source" / "000.tar", scenes(60, 0))
    curated, _ = flow.curate_source(SourceConfig(), str(tmp_path / "source"), CURATION)
    reader = open_curated(curated)
    rows = [row for part in reader.parts() for row in reader.selection(part).to_pylist()]
    episodes = {row["record_id"]: row["bucket"] for row in rows}
    assert {row["bucket"] for row in rows if row["width"] > row["height"]} == {"wide"}
    assert {row["bucket"] for row in rows if row["width"] == row["height"]} == {"rest"}

    indices, _ = encode(curated, components[0], tmp_path, groups=1)
    latents_dir = open_latents(*indices)
    dataset = LatentDataset(latents_dir)
    ids = dataset.record_ids(range(len(dataset)))
    lengths = np.asarray(dataset.text_tokens)[np.asarray(dataset.caption_texts)]
    middle = int(np.median(lengths))

    def drawn(*overrides: str) -> tuple[set[str], np.ndarray]:
        """Episodes, and tokens of the captions, of 60 steps."""
        order = order_of(["train.caption_dropout=0", *overrides], dataset, latents_dir)
        plans = [order.batch(step) for step in range(60)]
        tokens = np.asarray(dataset.text_tokens)[np.concatenate([plan.text_rows for plan in plans])]
        return {episodes[ids[row]] for plan in plans for row in plan.rows}, tokens

    both, all_tokens = drawn()
    assert both == {"wide", "rest"} and min(all_tokens) <= middle < max(all_tokens)
    assert drawn("train.stages[0].bucket_weights={wide: 0.0}")[0] == {"rest"}
    assert drawn("train.stages[0].bucket_weights={rest: 0.0}")[0] == {"wide"}
    entries = f"[{{up_to_tokens: {middle}, weight: 0.0}}, {{up_to_tokens: 1024, weight: 1.0}}]"
    _, tokens = drawn(f"train.stages[0].caption_weights={entries}")
    assert (tokens > middle).mean() > 1.5 * (all_tokens > middle).mean()


def test_the_17b_recipe_weights_its_buckets_and_the_lengths_of_captions():
    recipe = load_recipe("nucleus_17b")
    names = {episode.name for episode in recipe.curation.buckets}
    first, *_, last = recipe.train.stages
    assert set(first.bucket_weights) <= names and set(first.bucket_weights.values()) - {1.0}
    longest = [stage.caption_weights[-1].weight / stage.caption_weights[0].weight for stage in recipe.train.stages]
    assert longest == sorted(longest) and longest[0] < 1 < longest[-1], "longer captions at higher resolutions"
