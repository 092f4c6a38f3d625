"""Requests to an endpoint: which one, how often, with what content, and within what time."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate

import pytest
from PIL import Image
from pydantic import ValidationError
from stub_endpoint import stub_endpoint

from tasks.curation import http_retries
from tasks.curation.captioning import CAPTIONERS, build_captioner, check_captioner, chosen_captioner, endpoint
from tasks.curation.captioning.base import Request
from tasks.curation.config import CaptionerConfig
from tasks.recipe import load_recipe

CHOICE = {"message": {"content": "a dog on a beach"}, "finish_reason": "stop"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http_retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv(endpoint.ENDPOINTS, raising=False)


@pytest.fixture
def stub():
    with stub_endpoint(share=0.0) as stub:
        yield stub


def config(url: str = "http://127.0.0.1:1/v1", **changes) -> CaptionerConfig:
    return CaptionerConfig(**({"name": "openai", "model": "captioner", "endpoint": url, "max_retries": 2} | changes))


def asked(number: int = 0) -> Request:
    return Request(f"{number:064x}", "short", 1, Image.new("RGB", (32, 24), (number, 0, 0)), "one phrase", 64, number)


def answers(stub, requests, **changes):
    captioner = build_captioner(config(stub.url, **changes))
    try:
        return list(captioner.answers(requests))
    finally:
        captioner.close()


def test_an_endpoint_must_be_listed_and_those_of_this_machine_are(monkeypatch):
    url = "http://vllm-captioner:8000/v1"
    with pytest.raises(ValueError, match=r"vllm-captioner.* is not allowed.*NUCLEUS_ENDPOINTS lists none"):
        check_captioner(config(url))
    monkeypatch.setenv(endpoint.ENDPOINTS, f"https://other.example/v1, {url}/")
    check_captioner(config(url + "/"))
    for other in (
        "http://vllm-captioner:8001/v1",
        "http://vllm-captioner.evil.example/v1",
        "https://vllm-captioner:8000/v1",
    ):
        with pytest.raises(ValueError, match="not allowed"):
            check_captioner(config(other))
    for own in ("http://localhost:8000/v1", "http://127.0.0.1:9/v1", "http://[::1]:9/v1"):
        check_captioner(config(own))
    with pytest.raises(ValueError, match="not allowed"):
        check_captioner(config("http://127.0.0.1.evil.example/v1"))


def test_a_recipe_contains_no_login():
    with pytest.raises(ValidationError, match="has a login") as error:
        config("https://user:secret@host.example/v1")
    assert "secret" not in error.value.errors()[0]["msg"]
    with pytest.raises(ValidationError, match="api_key_env"):
        config(api_key_env="AWS_SECRET_ACCESS_KEY")
    for url in ("ftp://host/v1", "host:8000", "http://host/v1?key=a"):
        with pytest.raises(ValidationError, match="must be an http"):
            config(url)


def test_the_key_is_read_only_from_the_named_variable(stub, monkeypatch):
    with pytest.raises(ValueError, match="CAPTIONER_API_KEY: this variable is not set"):
        answers(stub, [asked()], api_key_env="CAPTIONER_API_KEY")
    monkeypatch.setenv("CAPTIONER_API_KEY", "s3cr3t")
    answers(stub, [asked()], api_key_env="CAPTIONER_API_KEY")
    answers(stub, [asked(1)])
    assert [headers.get("authorization") for headers in stub.headers] == ["Bearer s3cr3t", None]


def test_names_are_checked_with_a_suggestion():
    assert {spec.name for spec in CAPTIONERS} == {"qwen3-vl", "openai", "scenes"}
    with pytest.raises(ValueError, match="did you mean 'openai'"):
        chosen_captioner(config(name="opennai"))
    with pytest.raises(ValueError, match=r"curation.captioner.name='qwen3vl' is unknown; did you mean 'qwen3-vl'"):
        load_recipe("smoke", ["curation.captioner={name: qwen3vl}"])
    with pytest.raises(ValueError, match=r"lengths.long.max_words=200 is over curation.captions.max_words=14"):
        load_recipe("smoke", ["curation.captioner={name: scenes, lengths: {long: {prompt: x, min_words: 1, max_words: 200, max_tokens: 9}}, per_tier: {A1: [long], A2: [], A3: [], A4: [], A5: []}}"])  # fmt: skip
    with pytest.raises(ValueError, match="names the class 'huge'"):
        load_recipe(
            "smoke", ["curation.captioner={name: scenes, per_tier: {A1: [huge], A2: [], A3: [], A4: [], A5: []}}"]
        )


@pytest.mark.parametrize(("value", "seconds"), [("2", 2.0), ("0.5", 0.5), ("-1", 0.0), ("99999", 600.0), ("soon", None), (None, None), ("nan", None)])  # fmt: skip
def test_retry_after_is_read_as_seconds(value, seconds):
    assert http_retries.retry_after_s(value) == seconds


def test_retry_after_is_read_as_a_date():
    assert 4 < http_retries.retry_after_s(formatdate(time.time() + 6, usegmt=True)) <= 6
    assert http_retries.retry_after_s(formatdate(time.time() - 60, usegmt=True)) == 0
    assert http_retries.retry_after_s(f"Mon, 01 Jan {10**21} 00:00:00 GMT") is None


def test_the_wait_that_an_endpoint_asks_for_is_kept(stub, monkeypatch):
    stub.fixed = [(429, {"retry-after": "30"}, b""), (503, {}, b"")]
    captioner, waits = build_captioner(config(stub.url)), []
    monkeypatch.setattr(captioner._stop, "wait", waits.append)
    ((_, answer),) = captioner.answers([asked()])
    captioner.close()
    assert answer.text.startswith("a wooden table") and waits[0] == 30 and waits[1] < 1


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, b""),
        (502, {}, b"<html>"),
        (200, {}, b"{}"),
        (200, {}, b"no json"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[" * 100_000),
        (200, {}, b'{"choices": [{"message": {"content": "half a \\ud83d"}}]}'),
    ],
)
def test_what_may_pass_is_asked_again(stub, bad):
    stub.fixed = [bad, bad]
    ((_, answer),) = answers(stub, [asked()])
    assert answer.finish_reason == "stop" and sum(stub.tries.values()) == 3
    stub.fixed = [bad] * 3
    with pytest.raises(ConnectionError, match="gave no answer in 3 attempts .*its answers so far are kept"):
        answers(stub, [asked(1)])


def test_a_request_that_is_refused_for_good_is_an_answer_and_a_wrong_key_is_an_error(stub):
    stub.fixed = [(400, {}, b"the image is too small")]
    ((_, answer),) = answers(stub, [asked()])
    assert answer.finish_reason == "rejected" and "too small" in answer.text
    stub.fixed = [(401, {}, b"who are you")]
    with pytest.raises(ValueError, match="answers HTTP 401: who are you"):
        answers(stub, [asked()])
    stub.fixed = [(401, {}, b"\x1b]0;title\x07")]
    with pytest.raises(ValueError, match=r"HTTP 401: \\x1b\]0;title\\x07"):
        answers(stub, [asked()])


def test_a_redirect_is_not_followed(stub):
    stub.fixed = [(307, {"location": "http://127.0.0.2:1/v1/chat/completions"}, b"")]
    with pytest.raises(ValueError, match="HTTP 307"):
        answers(stub, [asked()])


def test_an_unreachable_endpoint_is_a_connection_error():
    captioner = build_captioner(config(max_retries=1, timeout_s=2))
    with pytest.raises(ConnectionError, match="ConnectError"):
        list(captioner.answers([asked()]))


def test_answers_that_come_in_are_given_before_the_error_of_another(stub):
    choice = json.dumps({"choices": [CHOICE]}).encode()
    replies = iter([(503, {}, b""), (200, {}, choice), (200, {}, choice), (200, {}, choice)])
    all_asked = threading.Barrier(4)

    def reply(body):
        all_asked.wait(60)
        status = next(replies)
        time.sleep(0.0 if status[0] == 503 else 0.3)
        return status

    stub.reply = reply
    captioner = build_captioner(config(stub.url, max_retries=0, concurrency=4))
    seen = []
    with pytest.raises(ConnectionError):
        for request, _ in captioner.answers([asked(i) for i in range(4)]):
            seen.append(request.seed)
    assert len(seen) == 3


def test_a_filtered_answer_is_a_refusal(stub):
    for message in ({"content": None, "refusal": "I will not."}, {"content": "x"}):
        choice = {"message": message, "finish_reason": "content_filter"}
        stub.fixed = [(200, {}, json.dumps({"choices": [choice]}).encode())]
        ((_, answer),) = answers(stub, [asked()])
        assert answer.finish_reason == "content_filter"
