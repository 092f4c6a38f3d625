"""The interface of captioners, which answer a prompt about an image. checks.py and run.py process the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from tasks.curation.config import CaptionerConfig


class Request(NamedTuple):
    """One question.

    record_id, length, attempt: the record, the length class, and the number of the attempt, from 1.
    image: RGB, upright, at most `captioner.image_px` long.
    seed: differs between attempts.
    scene: the content of a rendered scene (made.scenes.Scene as a dict); else None.
    """

    record_id: str
    length: str
    attempt: int
    image: Image.Image
    prompt: str
    max_tokens: int
    seed: int
    scene: dict[str, Any] | None = None


class Answer(NamedTuple):
    """finish_reason: "stop"; "length": cut off at max_tokens; "content_filter"; "rejected": the request itself was
    refused, and another attempt would be too."""

    text: str
    finish_reason: str = "stop"


class Captioner:
    """A subclass has `answer`, or `answers` if it works on several requests at a time. It loads its model or connects on
    first use, not at construction.

    window: requests that it can work on at a time.
    reads_scenes: whether it needs `Request.scene`.
    """

    window = 64
    reads_scenes = False

    def __init__(self, config: CaptionerConfig) -> None:
        self.config = config

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yields each request with its answer as soon as it arrives, in any order.

        Raises:
            ConnectionError: the model is temporarily unreachable; requests without an answer may be repeated.
            ValueError: a permanent error, such as a wrong key.
        """
        for request in requests:
            yield request, self.answer(request)

    def close(self) -> None:
        """Releases the model or the connection."""
