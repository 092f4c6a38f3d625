"""The plan of curating a large corpus follows from the recipe, and docs/scale.md has what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.plan.data_costs import Corpus
from tasks.curation import plan
from tasks.curation.config import CaptionerConfig, CurationConfig, ScorerConfig
from tasks.curation.scorers import SCORERS, chosen_scorers, costs
from tasks.recipe import load_recipe

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "scale.md"


def printed(capsys, *arguments: str) -> str:
    assert plan.main(arguments) == 0
    return capsys.readouterr().out


def test_the_document_has_what_the_command_prints(capsys):
    text = DOCUMENT.read_text()
    for line in printed(capsys).splitlines():
        assert line in text, line


def test_ten_times_the_images_take_ten_times_the_core_hours_and_no_more_sub_tasks(capsys):
    rows = []
    for images in ("7e7", "7e8"):
        lines = printed(capsys, "--images", images, "--recipe", "nucleus_17b").splitlines()
        rows.append([cell.strip() for cell in next(x for x in lines if "passes 1 and 2" in x).split("|")])
    assert rows[0][2] == rows[1][2] == "2,000"
    core_hours = [float(row[6].replace(",", "")) for row in rows]
    assert 9.9 < core_hours[1] / core_hours[0] < 10.1


def hours(text: str, step: str) -> list[str]:
    """Cells of core-hours and GPU-hours of a row."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {step}")]
    return [cell.strip() for cell in row.split("|")[6:8]]


@pytest.mark.parametrize("name", ["nucleus_17b", "tiny"])
def test_every_scorer_of_a_recipe_has_a_row_with_hours_and_every_task_fits_its_limit(capsys, name):
    config, text = load_recipe(name).curation, printed(capsys, "--recipe", name)
    chosen = chosen_scorers(config.scorers)
    assert len(chosen) >= 2
    for one in chosen:
        cores, gpus = hours(text, f"pass 3: {', '.join(one.columns)} ({one.spec.name})")
        assert float((gpus if one.spec.resources == "gpu_single" else cores).replace(",", "")) > 0
    assert "TOO LONG" not in text
    tasks = {task.name: task for task in plan.tasks_of(Corpus(), config, plan.Rates())}
    assert {"score_group", "decide_corpus"} <= set(tasks)
    assert all(0 < 2 * task.hours < task.limit_hours for task in tasks.values()), tasks


def test_a_scorer_that_no_task_has_time_for_is_named_with_the_groups_that_it_needs(capsys):
    slow = load_recipe("tiny", ["curation.scorers.text_area=pp-ocr"]).curation
    text = "\n".join(plan.plan(Corpus(), slow, plan.Rates()))
    assert re.search(
        r"score_group: [\d.]+ h of 6 h. TOO LONG: it needs curation.max_groups of at least [\d,]+, and 5,000", text
    )
    text = "\n".join(plan.plan(Corpus(images=7e6, captions=1.5e7), slow, plan.Rates()))
    assert "TOO LONG" not in text


def test_every_scorer_that_runs_on_a_cpu_has_a_measured_rate():
    assert {spec.name for spec in SCORERS if spec.resources == "shard"} == set(costs.CPU_MS)


def test_a_model_of_unknown_size_is_not_counted_as_free(capsys):
    other = {"name": "nsfw-classifier", "repo_id": "someone/else", "revision": "0" * 40, "label": 1}
    config = CurationConfig(scorers=ScorerConfig(nsfw=other))
    assert hours("\n".join(plan.plan(Corpus(), config, plan.Rates())), "pass 3: nsfw")[1] == "unknown"


@pytest.mark.parametrize("repo_id", costs.IMAGES)
def test_the_flops_of_a_layer_of_an_encoder_are_those_that_torch_counts(repo_id):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTConfig,
        ViTModel,
    )

    tower = costs.IMAGES[repo_id]
    shape = {"hidden_size": tower.width, "intermediate_size": tower.hidden}
    heads = {"num_attention_heads": tower.width // 64}
    kinds = {
        "google": (
            SiglipVisionModel,
            SiglipVisionConfig,
            {"num_attention_heads": 16, "image_size": 384, "patch_size": 16},
        ),
        "openai": (CLIPVisionModel, CLIPVisionConfig, heads | {"image_size": 224, "patch_size": 14}),
    }
    model, config_class, options = kinds.get(repo_id.partition("/")[0], (ViTModel, ViTConfig, heads))

    def counted(layers: int) -> int:
        config = config_class(**shape, **options, num_hidden_layers=layers)
        config._attn_implementation = "eager"
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model(config)(pixel_values=torch.empty(1, 3, config.image_size, config.image_size))
        return counter.get_total_flops()

    assert tower.layers * (counted(2) - counted(1)) == tower.flops


def test_fewer_images_write_fewer_captions(capsys):
    writes = [
        row.split("|")[5].strip() for row in printed(capsys, "--images", "7e6").splitlines() if "captions" in row[:12]
    ]
    assert writes == ["9.4 GB"]  # twice, and the scores
    assert "captions" in printed(capsys) and "0.94 TB" in printed(capsys)


def test_a_recipe_without_embedding_captioner_or_spark_has_no_such_row(capsys):
    text = printed(capsys, "--recipe", "tiny")
    steps = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert not [step for step in steps if "embedding" in step or "captions" in step or "GPU" in step]
    assert "Spark application" not in text
    spark = CurationConfig(engine="spark")
    assert "Spark application" in "\n".join(plan.plan(Corpus(), spark, plan.Rates()))


def test_an_image_costs_a_request_for_each_length_class():
    def seconds(*classes: str) -> float:
        tiers = dict.fromkeys(("A1", "A2", "A3", "A4", "A5"), classes)
        return plan._caption_seconds(CaptionerConfig(name="openai", per_tier=tiers), plan.Rates())

    assert seconds("short", "long") == pytest.approx(seconds("short") + seconds("long"))
    assert seconds("short") < seconds("long") < 1.3 * seconds("short")  # most tokens are the image's


def test_the_pairs_of_unrelated_hashes_are_few_within_4_bits_and_very_many_within_14():
    assert 5e3 < plan.within(700e6, 4) < 1.5e4
    assert 5e11 < plan.within(700e6, 14) < 1.5e12


def test_what_cannot_be_planned_is_one_line(capsys):
    assert plan.main(["--images", "-1"]) == 1
    assert re.match(r"ValueError: images=-1.0 must be above 0\n$", capsys.readouterr().out)


def test_a_corpus_that_the_deciding_tasks_disk_cannot_hold_is_named_with_the_remedy():
    config = load_recipe("nucleus_17b").curation
    assert config.engine == "duckdb" and "TOO LARGE" not in "\n".join(plan.plan(Corpus(), config, plan.Rates()))
    twice = Corpus(images=1.4e9, captions=3e9, shards=140_000)
    line = next(x for x in plan.plan(twice, config, plan.Rates()) if "of disk" in x)
    assert "1.85 TB of 1.72 TB" in line and "TOO LARGE: it needs larger `tables`" in line
    spark = config.model_copy(update={"engine": "spark"})
    assert not [x for x in plan.plan(twice, spark, plan.Rates()) if "of disk" in x]


def test_more_pieces_of_a_sort_take_more_hours(monkeypatch):
    config = CurationConfig()
    before = plan._deciding_hours(Corpus(), config, plan.Rates())
    monkeypatch.setattr(plan, "PIECE_ROWS", plan.PIECE_ROWS // 4)
    assert plan._deciding_hours(Corpus(), config, plan.Rates()) > before + 3
