"""Captions of rendered scenes by rules: the content of a scene is known, so every word is correct."""

from __future__ import annotations

import numpy as np

from tasks.curation.captioning.base import Answer, Captioner, Request
from tasks.curation.captions import count_words
from tasks.curation.sources.made.scenes import Scene, captions


class SceneCaptioner(Captioner):
    """See base.Captioner. Chooses one of a scene's captions of the class's length, a different one at each attempt."""

    reads_scenes = True

    def answer(self, request: Request) -> Answer:
        if request.scene is None:
            return Answer("the image is not a rendered scene", "rejected")
        rng = np.random.default_rng([int(request.record_id[:15], 16), request.attempt])
        texts = captions(Scene.from_dict(request.scene), rng)
        length = self.config.lengths[request.length]
        fitting = [text for text in texts if length.min_words <= count_words(text) <= length.max_words]
        return Answer(fitting[int(rng.integers(len(fitting)))] if fitting else max(texts, key=count_words))
