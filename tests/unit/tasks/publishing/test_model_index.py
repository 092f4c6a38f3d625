"""The `model-index` in a model card's header is what huggingface_hub reads, with the scorecard's own numbers and names."""

from __future__ import annotations

import pytest
import yaml

from tasks.publishing.card import model_card
from tasks.recipe import load_recipe


def score(mean: float) -> dict:
    return {"mean": mean, "std": 0.01, "runs": 3, "seeds": [0, 1, 2], "interval": [mean - 0.05, mean + 0.05], "prompts": 9, "images": 27}  # fmt: skip


def scorecard(name: str, benchmark: str, scale: float, official: float | None = None) -> dict:
    noise = {"sampling": 0.006, "prompts": 0.021, "training": None, "training_runs": 0}
    return {
        "name": name,
        "benchmark": benchmark,
        "scale": scale,
        "overall": score(0.87654) | {"noise": noise} | ({} if official is None else {"official": official}),
        "tasks": {"colors": score(0.95), "entity - whole": score(0.71239)},
        "held_out": None,
        "counts": {"expected": 100, "generated": 99, "scored": 99, "failed": 1},
        "seeds": [0, 1, 2],
        "interval": {"method": "Wilson", "level": 0.95},
    }


CARDS = [
    scorecard("shapes", "shapes", 1.0),
    scorecard("geneval[ssd-mobilenet-v2]", "geneval", 1.0),
    scorecard("dpg[blip-vqa]", "dpg", 100.0),
    scorecard("oneig-text", "oneig-text", 1.0, official=0.6123),
    scorecard("captions[efficientnet-lite0+clip-similarity]", "captions", 1.0),
]


@pytest.fixture(scope="module")
def recipe() -> dict:
    return load_recipe("tiny").model_dump(mode="json")


def expected(card: dict) -> dict[str, float]:
    rows = {"overall": card["overall"], **card["tasks"]}
    return {
        f"{card['name']}, {name}": round(row.get("official", card["scale"] * row["mean"]), 4)
        for name, row in rows.items()
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_the_header_has_the_scorecards_numbers_under_its_full_name_with_task_and_dataset(recipe, card):
    header = yaml.safe_load(model_card(recipe, card, []).split("---\n")[1])
    (entry,) = header["model-index"]
    assert entry["name"] == recipe["publish"]["title"]
    (result,) = entry["results"]
    assert result["task"] == {"type": "text-to-image"}
    assert result["dataset"] == {"type": card["benchmark"], "name": card["name"]}
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == expected(card)
    assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_the_hubs_library_reads_every_score_and_writes_the_same_index(recipe, card):
    from huggingface_hub import EvalResult, ModelCard
    from huggingface_hub.repocard_data import eval_results_to_model_index

    text = model_card(recipe, card, [])
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.model_name == recipe["publish"]["title"]
    results = data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    assert {result.metric_name: result.metric_value for result in results} == expected(card)
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in results} == {("text-to-image", card["benchmark"], card["name"])}  # fmt: skip
    header = yaml.safe_load(text.split("---\n")[1])
    assert eval_results_to_model_index(data.model_name, results) == header["model-index"]


def test_a_second_headline_is_beside_the_first_in_the_card_its_index_and_each_under_its_full_name(recipe):
    first, second = scorecard("geneval[mask2former-clip]", "geneval", 1.0), scorecard("geneval2", "geneval2", 100.0)
    text = model_card(recipe, first, [], further=[second])
    (entry,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert [result["dataset"]["name"] for result in entry["results"]] == [first["name"], "geneval2"]
    metrics = [{metric["name"]: metric["value"] for metric in result["metrics"]} for result in entry["results"]]
    assert metrics == [expected(first), expected(second)]
    headlines = text[text.index("## Scores") :].split("\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in headlines] == [
        ["| `geneval[mask2former-clip]`", "0.877"],
        ["| `geneval2`", "87.654"],
    ]
    assert (
        "Score `geneval[mask2former-clip]`; 3 runs" in text
        and "Score `geneval2`; 3 runs" in text
        and "--benchmarks geneval2 --recipe tiny" in text
    )


def test_the_table_is_on_the_benchmarks_own_scale(recipe):
    text = model_card(recipe, scorecard("dpg[blip-vqa]", "dpg", 100.0), [])
    assert (
        "| **overall** | 87.654 | 1.000 | 82.654 to 92.654 |" in text
        and "| noise on the same prompts | 0.600 |" in text
    )


def test_a_pipeline_that_was_not_scored_has_no_index(recipe):
    from huggingface_hub import ModelCard

    assert "model-index" not in yaml.safe_load(model_card(recipe, None, []).split("---\n")[1])
    assert ModelCard(model_card(recipe, None, [])).data.eval_results is None


def test_names_from_data_cannot_break_out_of_the_header(recipe):
    card = scorecard("geneval[x\n---\n<script>]", "geneval", 1.0)
    card["tasks"] = {"a: &b *c\n---\n# d": score(0.5)}
    text = model_card(recipe, card, [])
    (entry,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    names = [metric["name"] for metric in entry["results"][0]["metrics"]]
    assert len(names) == 2 and not any(c in name for name in names for c in "<>\n#&*")
