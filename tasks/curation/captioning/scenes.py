"""Captions of rendered scenes by rules: the content of a scene is known, so every word is correct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tasks.curation.captioning.base import Answer, Request
from tasks.curation.captions import count_words
from tasks.curation.config import CaptionerConfig
from tasks.curation.sources.made.scenes import Scene, captions


def scenes(config: CaptionerConfig) -> SceneCaptioner:
    return SceneCaptioner(config)


class SceneCaptioner:
    """See base.Captioner. Chooses one of a scene's captions of the class's length, a different one at each attempt."""

    window, reads_scenes = 64, True

    def __init__(self, config: CaptionerConfig) -> None:
        self._lengths = config.lengths

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            yield request, self._answer(request)

    def _answer(self, request: Request) -> Answer:
        if request.scene is None:
            return Answer("the image is not a rendered scene", "rejected")
        rng = np.random.default_rng([int(request.record_id[:15], 16), request.attempt])
        texts = captions(Scene.from_dict(request.scene), rng)
        length = self._lengths[request.length]
        fitting = [text for text in texts if length.min_words <= count_words(text) <= length.max_words]
        return Answer(fitting[int(rng.integers(len(fitting)))] if fitting else max(texts, key=count_words))

    def close(self) -> None: ...
