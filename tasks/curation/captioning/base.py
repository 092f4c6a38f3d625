"""The interface of captioners, which answer a prompt about an image. checks.py and run.py process the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Request(NamedTuple):
    """One question.

    record_id, length, attempt: whose caption, of which class, and the how manieth attempt at it, from 1.
    image: RGB, upright, at most `captioner.image_px` long.
    seed: differs between attempts.
    scene: of a rendered scene, what it shows (made.scenes.Scene as a dict); else None.
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
    """finish_reason: "stop"; "length" where max_tokens cut it off; "content_filter"; "rejected" where the request itself
    was refused, which another attempt would be too."""

    text: str
    finish_reason: str = "stop"


class Captioner(Protocol):
    """Loads its model or connects on first use, not at construction.

    window: requests that it can work on at a time.
    reads_scenes: whether it needs `Request.scene`.
    """

    window: int
    reads_scenes: bool

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Each request with its answer, as soon as there is one, in any order.

        Raises:
            ConnectionError: the model cannot be reached for now; requests without an answer may be asked again.
            ValueError: it never will answer, such as with a wrong key.
        """
        ...

    def close(self) -> None: ...
