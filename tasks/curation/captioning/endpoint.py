"""Any endpoint with OpenAI's chat completions (vLLM, SGLang, a vendor's), such as k8s/captioner.

A recipe cannot allow an endpoint, since images and the key are sent there: NUCLEUS_ENDPOINTS lists the allowed URLs,
separated by commas. Loopback URLs are always allowed. Redirects are not followed, and no proxy or .netrc of the
environment is used.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tasks.curation.captioning.base import Answer, Captioner, Request
from tasks.curation.captioning.checks import check_language
from tasks.curation.config import CaptionerConfig
from tasks.curation.http_retries import retry_after_s, wait_s
from tasks.curation.sources.base import visible

if TYPE_CHECKING:
    import httpx

ENDPOINTS = "NUCLEUS_ENDPOINTS"
JPEG_QUALITY = 92
PASSING = {408, 425, 429, 500, 502, 503, 504, 529}
REJECTED = {400, 413, 415, 422}  # the request itself is refused; others may succeed
MAX_ANSWER_BYTES = 4 * 2**20


def check(config: CaptionerConfig) -> None:
    """
    Raises:
        ValueError: no endpoint or model, or one that NUCLEUS_ENDPOINTS does not list.
    """
    if not config.endpoint:
        raise ValueError("curation.captioner.endpoint is not set: give a URL such as http://vllm-captioner:8000/v1")
    if not config.model:
        raise ValueError("curation.captioner.model is not set: give the name that the endpoint serves")
    allowed = [url.strip().rstrip("/") for url in os.environ.get(ENDPOINTS, "").split(",") if url.strip()]
    if config.endpoint not in allowed and not _is_loopback(config.endpoint):
        listed = ", ".join(allowed) or "none"
        raise ValueError(
            f"curation.captioner.endpoint={config.endpoint!r} is not allowed: images and the key would be sent there. "
            f"{ENDPOINTS} lists {listed}; add the URL to it"
        )
    check_language(config.language)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint(Captioner):
    """See base.Captioner. Each request is retried separately, with waits that double or that Retry-After gives."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.window = 2 * config.concurrency
        self._client: httpx.Client | None = None
        self._stop = threading.Event()

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        self._stop.clear()
        if self._client is None:
            self._client = self._connect()
        failed: BaseException | None = None
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = {pool.submit(self._ask, request): request for request in requests}
            left = set(futures)
            try:
                while left:
                    done, left = wait(left, return_when=FIRST_COMPLETED)
                    for future in done:
                        if future.cancelled():
                            continue
                        if (error := future.exception()) is not None:
                            failed = failed or error
                            # No retries and no new requests; requests in flight are still answered.
                            self._stop.set()
                            for waiting in left:
                                waiting.cancel()
                            continue
                        yield futures[future], future.result()
            finally:
                self._stop.set()
                for future in left:
                    future.cancel()
        if failed is not None:
            raise failed

    def _ask(self, request: Request) -> Answer:
        import httpx

        body = self._body(request)
        problem = ""
        for retry in range(self.config.max_retries + 1):
            after: float | None = None
            try:
                status, headers, data = self._post(body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    answer = _parse(data)
                    if answer is not None:
                        return answer
                    problem = "an answer without a caption"
                elif status in REJECTED:
                    return Answer(f"HTTP {status}: {data[:300].decode(errors='replace')}", "rejected")
                elif status in PASSING:
                    problem, after = f"HTTP {status}", retry_after_s(headers.get("retry-after"))
                else:
                    text = visible(data[:300].decode(errors="replace"))
                    raise ValueError(f"captioner {self.config.endpoint} answers HTTP {status}: {text}")
            if retry < self.config.max_retries and self._stop.wait(wait_s(retry, after)):
                break
        raise ConnectionError(
            f"captioner {self.config.endpoint} gave no answer in {self.config.max_retries + 1} attempts ({problem}); "
            "run again: its answers so far are kept"
        )

    def _post(self, body: bytes) -> tuple[int, Any, bytes]:
        import httpx

        assert self._client is not None
        with self._client.stream("POST", f"{self.config.endpoint}/chat/completions", content=body) as response:
            data = b""
            for piece in response.iter_bytes():
                data += piece
                if len(data) > MAX_ANSWER_BYTES:
                    raise httpx.RemoteProtocolError(f"an answer of more than {MAX_ANSWER_BYTES // 2**20} MiB")
            return response.status_code, response.headers, data

    def _connect(self) -> httpx.Client:
        import httpx

        headers = {"content-type": "application/json"}
        if self.config.api_key_env:
            key = os.environ.get(self.config.api_key_env)
            if not key:
                raise ValueError(f"curation.captioner.api_key_env={self.config.api_key_env}: this variable is not set")
            headers["authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=self.config.concurrency, max_keepalive_connections=None)
        return httpx.Client(
            headers=headers, timeout=self.config.timeout_s, limits=limits, follow_redirects=False, trust_env=False
        )

    def _body(self, request: Request) -> bytes:
        buffer = io.BytesIO()
        request.image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.prompt}]
        fields = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": self.config.temperature,
            "seed": request.seed,
        }
        return json.dumps(fields).encode()

    def close(self) -> None:
        self._stop.set()
        if self._client is not None:
            self._client.close()
            self._client = None


def _parse(data: bytes) -> Answer | None:
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        if text is None:
            text = choice["message"].get("refusal") or ""
            return _answer(str(text), "content_filter") if text else None
        return _answer(str(text), str(choice.get("finish_reason") or "stop"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def _answer(text: str, finish_reason: str) -> Answer:
    """
    Raises:
        UnicodeEncodeError: JSON may contain lone surrogates, which tables cannot store.
    """
    text.encode()
    return Answer(text, finish_reason)
