"""The benchmark `captions`: compares generated images with the real ones of held-out captions of your own corpus.

    prompts file: captions, each with its real image --(a pipeline)--> images
    images and real images --features--> match, precision, recall, coverage; Frechet distance
    images and captions --similarity (where a judge is given)--> similarity

match: the share of other captions' real images that are farther from an image than its own caption's: 0.5 by chance. It
shows learning long before images look real, which the other subscores measure.

A score relates the model's images to this corpus, in the features of the judge in its name. It is comparable between
models of one corpus, but not with published scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import base, manifold
from eval.benchmarks.base import AnswerType, Benchmark, Judged, Mode, Pooling, Prompt, PromptSet, Question, Scored
from eval.files import read_json_lines

REAL = "real_features"
SUBSCORES = ("match", "precision", "recall", "coverage", "similarity")


class Captions(Benchmark):
    """See `eval.benchmarks.base.Benchmark`. The overall score is the mean of the subscores that were judged.

    A prompt has "reference": {"file", "sha256"}, the real image of its caption, relative to the folder of the prompts.
    """

    name = "captions"
    tasks = ("captions",)
    judges: Mapping[str, str] = {"features": "", "similarity": ""}
    optional_judges = frozenset({"similarity"})
    default_judges: Mapping[str, str] = {"features": "efficientnet-lite0"}
    answer_types: Mapping[str, AnswerType] = {"features": "numbers", "similarity": "number"}
    pooling: Pooling = "parts"
    prompt_sets: tuple[PromptSet, ...] = ("official", "development")  # held-out images with the lowest, the highest ids
    data = "captions.jsonl with the real images of held-out captions, as evaluation makes it of a curated corpus"

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """
        Raises:
            ValueError: no such file, or a line without caption or real image; names the line.
        """
        path = base.required(path, self)
        prompts = []
        for number, row in read_json_lines(path):
            reference = row.get("reference") if isinstance(row, dict) else None
            if not isinstance(reference, dict) or not {"file", "sha256"} <= reference.keys() or not row.get("prompt"):
                raise ValueError(f"{path}, line {number}: needs 'prompt' and 'reference' with 'file' and 'sha256'")
            prompts.append({"tag": "captions", **row})
        if len(prompts) < 2:
            raise ValueError(f"{path} has {len(prompts)} captions, and distributions need at least two")
        return prompts

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """Asks for the features of the image and of the real one, and the similarity of image and caption."""
        asked = [
            Question("features", "features"),
            Question("features", REAL, reference=True),
            Question("similarity", "similarity", str(prompt["prompt"])),
        ]
        return [question for question in asked if question.key not in answers]

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float | None, str]:
        return answers.get("similarity"), ""

    def score(self, prompt: Prompt, judged: Judged) -> Scored:
        """The score of one prompt alone: the similarity. `score_all` adds the rest."""
        scored = super().score(prompt, judged)
        return replace(scored, subscores={"similarity": scored.score})

    def score_all(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> dict[str, Scored]:
        """An image's score is its similarity, or its match if that was not judged."""
        ids, real, places, generated = _features(prompts, judged)
        row_of = {key: row for row, key in enumerate(ids)}
        texts = [str(prompt["prompt"]) for prompt in prompts if prompt["id"] in row_of]
        members, match = None, np.empty(0)
        if min(len(real), len(generated)) >= 2:
            members = manifold.memberships(real, generated)
            match = manifold.matches(real, generated, np.array([row_of[key] for key, _ in places]))
        number_of = {place: i for i, place in enumerate(places)}
        result = {}
        for prompt in prompts:
            key, images = prompt["id"], judged[prompt["id"]].images
            row = row_of.get(key)
            shown: list[tuple[float | None, float | None, str]] = []  # match, precision, reason
            for number, answers in enumerate(images):
                i = number_of.get((key, number))
                if i is None or members is None:
                    shown.append((None, None, "not judged" if answers is None else ""))
                    continue
                near = members.nearest[i]
                shown.append(
                    (
                        float(match[i]),
                        float(members.precise[i]),
                        f"{match[i]:.0%} of other captions' real images are farther than its own; the nearest is that of "
                        f"{texts[near]!r}, {'among' if members.precise[i] else 'outside of'} the real images",
                    )
                )
            similarities = [None if a is None else a.get("similarity") for a in images]
            scores = tuple(m if s is None else s for (m, _, _), s in zip(shown, similarities, strict=True))
            subscores = {
                "match": base.mean([m for m, _, _ in shown]),
                "precision": base.mean([p for _, p, _ in shown]),
                "recall": None if members is None or row is None else float(members.recalled[row]),
                "coverage": None if members is None or row is None else float(members.covered[row]),
                "similarity": base.mean(similarities),
            }
            result[key] = Scored(base.mean(scores), scores, tuple(reason for _, _, reason in shown), subscores)
        return result

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """See `Benchmark.summarise`: the mean of each subscore over the prompts that have it, and the mean of these."""
        base.check_known(prompts, judged)
        whole = base.complete(prompts, judged)
        scored = self.score_all(prompts, whole)
        subscores = {name: base.mean([one.subscores[name] for one in scored.values()]) for name in SUBSCORES}
        categories = {name: value for name, value in subscores.items() if value is not None}
        if not categories:
            raise ValueError(f"none of {len(prompts)} prompts has an image that was judged")
        images = [answers for one in whole.values() for answers in one.images]
        failed = images.count(None)
        return {
            "score": base.mean(list(categories.values())),
            "categories": categories,
            "expected": len(images),
            "scored": len(images) - failed,
            "failed": failed,
        }

    def measures(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> dict[str, float]:
        """The Frechet distance of the generated images, that between halves of the real ones, and the numbers of
        images."""
        _, real, _, generated = _features(prompts, judged)
        if min(len(real), len(generated)) < 2:
            return {}
        floor = manifold.halves(real)
        measures = {
            "frechet_distance": manifold.frechet_distance(real, generated),
            "real_images": float(len(real)),
            "generated_images": float(len(generated)),
        }
        return measures if floor is None else {**measures, "frechet_distance_between_halves_of_the_real_images": floor}


def _features(
    prompts: Sequence[Prompt], judged: Mapping[str, Judged]
) -> tuple[list[str], np.ndarray, list[tuple[str, int]], np.ndarray]:
    """(ids of prompts with a real image's features, these [n, d], (id, image) of generated ones, theirs [m, d])."""
    ids, real, places, generated = [], [], [], []
    for prompt in prompts:
        key = prompt["id"]
        if REAL in judged[key].together:
            ids.append(key)
            real.append(judged[key].together[REAL])
        for number, answers in enumerate(judged[key].images):
            if answers is not None and "features" in answers:
                places.append((key, number))
                generated.append(answers["features"])
    return ids, np.array(real, dtype=np.float64), places, np.array(generated, dtype=np.float64)


BENCHMARK = Captions()
