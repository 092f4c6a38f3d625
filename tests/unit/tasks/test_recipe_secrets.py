"""No message about a recipe shows a password or a signed query of a URI, whatever it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tasks.recipe import RECIPES, Recipe, load_recipe, recipe_text

SECRET = "SECRET"
URIS = [
    f"s3://u:{SECRET}@bucket/x",
    f"http://u:{SECRET}@host.corp:99999/v1?X-Amz-Signature={SECRET}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={SECRET}&X-Amz-Expires=600",
]
MISSPELT = [
    "train.checkpoint_url",
    "publish.hub_repo",
    "curation.captioner.endpoints",
    "nothing",
    "train.stages[0].nane",
]


def keys(schema: dict[str, Any]) -> Iterator[str]:
    """An override's key of every value in the schema, and of every section and list."""
    definitions = schema["$defs"]

    def walk(node: dict[str, Any], at: str) -> Iterator[str]:
        if at:
            yield at
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        for one in node.get("anyOf", ()):
            yield from walk(one, at)
        for name, one in node.get("properties", {}).items():
            yield from walk(one, f"{at}.{name}".strip("."))
        if isinstance(values := node.get("additionalProperties"), dict):
            yield from walk(values, f"{at}.name")
        if "items" in node:
            yield from walk(node["items"], f"{at}[0]")

    yield from sorted(set(walk(schema, "")))


def message(*overrides: str, recipe: str = "smoke") -> str:
    try:
        load_recipe(recipe, overrides)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("uri", [URIS[0], URIS[2]])
@pytest.mark.slow
def test_no_refusal_of_a_value_of_any_setting_shows_a_secret(uri):
    settings = list(keys(Recipe.model_json_schema()))
    messages = {key: message(f"{key}={json.dumps(uri)}") for key in settings}
    assert sum(bool(text) for text in messages.values()) > 150, "most settings refuse a URI"
    assert [text for text in messages.values() if SECRET in text] == []


@pytest.mark.parametrize("uri", URIS)
def test_no_refusal_of_a_list_a_mapping_or_a_key_shows_a_secret(uri):
    recipe = json.loads(recipe_text(str(RECIPES / "smoke.yaml")))
    for key in recipe:
        for value in ([uri, uri], {uri: uri}, {"name": {uri: [uri]}}):
            text = message(recipe=json.dumps(recipe | {key: value}))
            assert text and SECRET not in text


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("key", MISSPELT)
def test_no_refusal_of_a_misspelt_key_shows_a_secret(key, uri):
    for value in (uri, json.dumps(uri), f"{{a: '{uri}', b: \"{uri}\"}}", json.dumps(uri).replace("/", r"\/")):
        text = message(f"{key}={value}")
        assert "unknown key" in text and SECRET not in text
    assert SECRET not in message(f"{key} {uri}"), "no ="
    assert SECRET not in message(f"train.stages[99].name={uri}")


@pytest.mark.parametrize("uri", [*URIS, f"s3://u:{SECRET * 50}@bucket/x", f"s3://u:{'x' * 100}{SECRET}@b/{'y' * 100}"])
def test_no_refusal_of_what_is_not_yaml_shows_a_secret(uri, tmp_path):
    """Also where PyYAML would quote a part of it, without its :// or its @."""
    wrong = [f"[{uri}", f"{{a: {uri}, a: {uri}}}", f'"{uri}', f"'{uri}' x", f"{uri} : {uri} : {uri}", f"!{uri} x", f"*{uri}",
             f"[{'x, ' * 20}{uri} ]]", f"&a [*a, {uri}]"]  # fmt: skip
    for value in wrong:
        text = message(f"train.checkpoint_uri={value}")
        assert "is not valid YAML" in text and SECRET not in text
        path = tmp_path / "wrong.yaml"
        path.write_text(f"name: x\ntrain:\n  checkpoint_uri: {value}\n")
        for text in (message(recipe=str(path)), message(recipe=f"{{train: {value}}}")):
            assert "is not valid YAML" in text and SECRET not in text


@pytest.mark.parametrize("uri", URIS)
def test_no_refusal_of_a_recipe_at_a_uri_shows_a_secret(uri):
    assert SECRET not in message(recipe=uri)
    with pytest.raises(ValueError) as error:
        recipe_text(uri)
    assert SECRET not in str(error.value)


def test_a_message_keeps_what_is_between_two_uris():
    text = message("train.checkpoint_url={a: 's3://u:p@one/x', b: 'https://two/y?sig=1', c: 3}")
    assert "{a: 's3://...@one/x', b: 'https://two/y?...', c: 3}" in text and "did you mean 'checkpoint_uri'?" in text
