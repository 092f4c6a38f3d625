"""What is published names no place and nobody, whatever setting named it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eval.config import FILES
from tasks.publishing import redact
from tasks.recipe import Recipe, load_recipe

COMMIT = "0123456789" * 4


def strings_everywhere(schema: dict[str, Any], planted: str, branch: int, at: str = "") -> Any:
    """A recipe with `planted` in each field that may be a text, and as each free key.

    Args:
        branch: of the types of a field that has several: 0 or -1.
    """
    definitions = schema["$defs"]

    def fill(node: dict[str, Any], at: str) -> Any:
        if "$ref" in node:
            return fill(definitions[node["$ref"].rpartition("/")[2]], at)
        if "anyOf" in node:
            return fill([one for one in node["anyOf"] if one.get("type") != "null"][branch], at)
        if "properties" in node:
            return {name: fill(one, f"{at}.{name}".strip(".")) for name, one in node["properties"].items()}
        if isinstance(values := node.get("additionalProperties"), dict):
            return {planted: fill(values, f"{at}.*")}
        if node.get("type") == "array":
            return [fill(one, f"{at}[]") for one in node.get("prefixItems", [node.get("items", {})])]
        if node.get("type") == "string" and not {"enum", "const"} & set(node) and at not in redact.KEPT:
            return planted
        return None

    return fill(schema, at)


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, one in value.items() for text in [str(key), *texts(one)]]
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("branch", [0, -1])
@pytest.mark.parametrize(
    "place",
    ["/home/someone/a b", "./someone", "../someone", "~/someone", "~someone/x", "s3://someone/x", "http://someone:8000/v1",
     "file:///home/someone", "mplug@/home/someone", "mplug@./someone", "module:function@/home/someone", "see https://someone/",
     "source = '/home/someone'", "(/home/someone)", "`/home/someone`", "</home/someone", "</home/someone>", "-/home/someone", "a>/home/someone",
     "+/home/someone", "&/home/someone", "\u201c/home/someone\u201d", "\u00ab/home/someone", "*/home/someone*", "_/home/someone_", "//fs01/someone",
     "end./home/someone", "1./home/someone", "`./someone`", "`~/someone`", "<../someone", "${HOME}/someone", "$HOME/someone", "file:/home/someone",
     "C:\\Users\\someone", "(c:/Users/someone", "C:\\\\Users\\\\someone", "\\\\fs01\\someone", "..\\someone", "~\\someone",
     "%USERPROFILE%\\someone", "%2Fhome%2Fsomeone", "host:8000/someone", "someone.corp:8000", "at=someone.corp:8000/v1", "someone-1:443/v1", "10.1.2.3/someone", "10.1.2.3:8000 someone",
     "someone@example.org", "to <someone@example.org>", "git@host.corp:someone/y", "git@host:someone/y", "s.o+meone,someone@a.b", "x@someone.org",
     "someone@10.1.2.3"],
)  # fmt: skip
def test_a_place_in_any_text_of_a_recipe_is_not_published(place, branch):
    planted = strings_everywhere(Recipe.model_json_schema(), place, branch)
    assert len([text for text in texts(planted) if text == place]) > 50, "the schema has over 50 texts"
    public = redact.recipe(planted)
    assert "someone" not in json.dumps(public)
    assert json.dumps(public).count(redact.PRIVATE) > 50


@pytest.mark.parametrize("branch", [0, -1])
def test_settings_that_may_be_a_relative_path_are_not_published(branch):
    planted = strings_everywhere(Recipe.model_json_schema(), "someone/lists/x.txt", branch)
    public = redact.recipe(planted)
    for key in (*redact.SETTINGS, "train.init_from", *(f"eval.{key}" for key in FILES)):
        value = public
        for step in key.split("."):
            value = value[step]
        assert value == redact.PRIVATE, key


def test_the_weights_of_a_judge_are_published_as_a_commit_alone():
    judges = {
        "vqa": "mplug@weights/mplug",
        "style": f"clip-color@{COMMIT}",
        "features": "dinov2",
        "color": f"mplug@x@{COMMIT}",
    }
    assert redact.evaluation({"judges": judges})["judges"] == {
        "vqa": "mplug@(private)", "style": f"clip-color@{COMMIT}", "features": "dinov2", "color": "mplug@(private)",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["data/someone@lab/x", f"someone@x@{COMMIT}", f"someone/x@{COMMIT}0", "someone@"])
def test_initial_weights_that_are_no_repository_at_a_commit_are_not_published(place):
    assert redact.recipe({"train": {"init_from": place}})["train"]["init_from"] == redact.PRIVATE


@pytest.mark.parametrize("name", ["nucleus_17b", "tiny", "smoke"])
def test_a_recipe_without_places_is_published_as_it_is(name):
    recipe = load_recipe(name).model_dump(mode="json")
    public = redact.recipe(recipe)
    for holder, key in ((recipe["source"], "path"), (recipe["curation"]["captioner"] or {}, "endpoint")):
        if holder.get(key):
            holder[key] = redact.PRIVATE
    assert public == recipe


def test_hub_ids_and_texts_with_slashes_are_published():
    kept = [
        "someone/vae",
        f"ORG/REPO/transformer@{COMMIT}",
        "width / height > 2",
        "and/or",
        "16:9",
        "image/",
        "</s>",
        "a ~ b",
        "1./2",
        "owner_/vae",
        f"owner.x/vae-1.5@{COMMIT}",
        "mplug@main",
        "module.sub:function",
        "4:3, 16:9/9:16 or 1:1",
        "ratio:16/9",
        "at 10:30/12:45",
        "image/jpeg; q=0.8, image/webp",
        "<br/> and <br />",
        "a photo, 50% off, @ noon",
        "line\\nbreak \\d",
        "CLIP ViT-B/32",
        "torch 2.4.1",
        "5.0.0.93",
        "$5/month",
        "x@",
    ]
    assert redact.recipe({"name": "x", "train": {"sample_prompts": kept}})["train"]["sample_prompts"] == kept
    assert redact.recipe({"train": {"init_from": kept[1]}})["train"]["init_from"] == kept[1]


def test_a_published_scorecard_names_no_place_and_keeps_its_public_sources():
    config = {"prompts_file": "someone/p.jsonl", "judges": {"vqa": "mplug@/home/someone"}, "seeds": [0]}
    card = {
        "config": config,
        "generation": {"config": config, "provenance": {"model": "/home/someone/m"}},
        "settings": {"judges": [{"model": "/home/someone/j"}]},
        "references": [{"source": "https://example.org/paper"}],
    }
    public = redact.scorecard(card)
    assert "someone" not in json.dumps(public) and public["references"] == card["references"]
    assert public["config"]["seeds"] == [0] and config["prompts_file"] == "someone/p.jsonl"
