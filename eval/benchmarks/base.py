"""The interface of a benchmark: prompts, questions to judges about their images, and the rule that scores the answers.

    prompts() --(a pipeline)--> images --questions()--> (judges) --> answers --score()--> score of a prompt
                                                                     answers --summarise()--> the benchmark's scores

A prompt is a JSON object with "id" (text; the same prompt has the same id in every run), "prompt", "tag" (the task it
belongs to), and what the rule reads. Images of a prompt are identified by their order (0, 1, ...), whether the official
layout has them as files or as tiles of one grid.

Scores of images and prompts are floats in [0, 1] (Soft-TIFA may pass 1 by a little). Summaries are on the published
scale, `Benchmark.scale`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eval.files import read_json_lines
from eval.modes import Mode

PromptSet = Literal["official", "development"]
# How the overall score follows from prompts: the plain mean of categories, of prompts, or of subscores of prompts
# ("parts", the value that stored scorecards have).
Pooling = Literal["categories", "prompts", "parts"]
# "texts": one for each box of the question; "objects": {class: detections}, as in eval.geneval.
AnswerType = Literal["text", "texts", "number", "numbers", "objects"]
Prompt = Mapping[str, Any]
# The answers about one image, by `Question.key`; None for an image that is missing or could not be judged.
Answers = Mapping[str, Any] | None


@dataclass(frozen=True)
class Question:
    """A question to one judge about one image, or about all images of a prompt together.

    Attributes:
        judge: the judge that answers, a key of `Benchmark.judges`.
        key: the answer's key in the image's answers.
        text: the question in the words of the official code; "" if a judge needs none.
        options: further inputs of the judge, JSON values; together with `judge` and `text` it identifies a question.
        together: asked once about all images of the prompt.
        reference: asked about the prompt's real image ("reference" of the prompt) instead of a generated one.
    """

    judge: str
    key: str
    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    together: bool = False
    reference: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the question, its part of the key under which an answer is cached."""
        asked = json.dumps([self.judge, self.text, dict(self.options)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


@dataclass(frozen=True)
class Judged:
    """The answers about one prompt.

    Attributes:
        images: the answers about each expected image, in order; None for one that is missing, unreadable or left out.
        left_out: number of images that the rule leaves out (see `Benchmark.jpeg_tiles`).
        together: the answers to questions about all images, and about the prompt's real image.
    """

    images: Sequence[Answers]
    together: Mapping[str, Any] = field(default_factory=dict)
    left_out: int = 0


@dataclass(frozen=True)
class Scored:
    """The scores of one prompt.

    Attributes:
        score: of the prompt; None if no image was judged.
        images: of each image; None if it was not judged.
        reasons: why each image is not fully right; "" if it is, or if the rule gives no reason.
        subscores: named scores of the prompt, if the rule has several.
    """

    score: float | None
    images: tuple[float | None, ...]
    reasons: tuple[str, ...]
    subscores: Mapping[str, float | None] = field(default_factory=dict)


class Source(NamedTuple):
    """Prompt files of a GitHub repository at a commit.

    files: path -> SHA-256, or None if it is not known.
    prompts: the file that `Benchmark.prompts` reads, "" for the folder.
    """

    repository: str
    commit: str
    files: Mapping[str, str | None]
    prompts: str


class Published(NamedTuple):
    """A published score, in the benchmark's own scale, by the official judges."""

    model: str
    score: float
    source: str
    category: str = "overall"


class Benchmark:
    """The base class of the registry's objects. A subclass sets `name` and `judges`, and has `score_image`; everything else
    has a default.

    Attributes:
        name, version: of the rule; the version names the official commit.
        scale: the perfect summary score, 1 or 100.
        tasks: the tags, in the order of published tables; () if prompts are not grouped.
        texts: the prompts, if they are part of this package and need nothing but their text.
        prompt_count, images_per_prompt: the official numbers; a `prompt_count` of 0: any number.
        grid: (columns, rows) of the picture with a prompt's images; None if each image is a file.
        judges: {judge: the official model}; "": no official model, and the score always names its judge.
        optional_judges: judges that a score does not require.
        default_judges: {judge: name in eval.judges.registry} where a recipe names none.
        recommended_judges: the same where a command names none; they run with weights of the Hub alone, and need not be
            official.
        packaged_judges: replace recommended ones on a machine without a GPU; their weights are in Python packages.
        answer_types: {judge: the type of its answers}; those of other judges are not checked.
        vocabulary: {skill: the vocabulary of answers that the rule counts}, where judges of one skill differ: how yes is
            written ("vqa"), or whose classes are found ("detector").
        pooling: how the overall score follows from prompts, for its interval.
        jpeg_tiles: the official code cuts pictures into tiles: judges see each through JPEG (quality 75), and black ones,
            which stand for images that could not be generated, are left out.
        prompt_sets: the sets of prompts that it has without a prompts_file.
        data: the file that `prompts` reads, and its source; "" for made prompts.
        source: where `data` is downloaded from; None if it is not downloaded.
        published: scores of other models, for the card.
    """

    name: str
    version: str = "1"
    scale: float = 1.0
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    prompt_count: int = 0
    images_per_prompt: int = 1
    grid: tuple[int, int] | None = None
    judges: Mapping[str, str]
    optional_judges: frozenset[str] = frozenset()
    default_judges: Mapping[str, str] = {}
    recommended_judges: Mapping[str, str] = {}
    packaged_judges: Mapping[str, str] = {}
    answer_types: Mapping[str, AnswerType] = {}
    vocabulary: Mapping[str, str] = {}
    pooling: Pooling = "prompts"
    jpeg_tiles: bool = False
    prompt_sets: tuple[PromptSet, ...] = ("official",)
    data: str = ""
    source: Source | None = None
    published: Sequence[Published] = ()

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """The prompts, from the official data at `path`. Here: `texts`, or the lines of a JSON Lines file, each with at
        least "prompt".

        Raises:
            ValueError: the data is missing or malformed; names the file and the expected content.
        """
        if path is None and self.texts:
            rows: list[dict[str, Any]] = [{"prompt": text} for text in self.texts]
        else:
            path = required(path, self)
            rows = []
            for number, row in read_json_lines(path):
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise ValueError(f"{path}, line {number}: must be a JSON object with a text 'prompt'")
                rows.append(row)
        return [{"id": f"{index:05d}", "tag": self.name, **row} for index, row in enumerate(rows)]

    def made_prompts(self, prompt_set: PromptSet, per_task: int | None) -> Sequence[Prompt] | None:
        """Prompts that this package makes, without ids; None if the set is read from `data`.

        Args:
            per_task: number of prompts of each task; None: all.
        """
        return None

    def picture_path(self, prompt: Prompt, image: int, model: str) -> str:
        """Path of an image (or of its grid) in the official layout, relative to the folder of images."""
        return f"{prompt['id']}/{image:04d}.png"

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """The questions about an image that can be asked now; empty if its answers are complete. Here: one to each judge,
        with the prompt's text.

        Args:
            answers: answers so far; a question may need an earlier answer.
        """
        return [Question(judge, judge, str(prompt["prompt"])) for judge in self.judges if judge not in answers]

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float | None, str]:
        """An image's score, None if no judge of its rule was asked, and why it is not fully right ("" if it is).

        Raises:
            ValueError: an answer is missing or malformed.
        """
        raise NotImplementedError

    def score(self, prompt: Prompt, judged: Judged) -> Scored:
        """The scores of one prompt: the mean of its images.

        Raises:
            ValueError: see `score_image`.
        """
        images = [(None, "not judged") if a is None else self.score_image(prompt, a) for a in judged.images]
        scores = tuple(score for score, _ in images)
        return Scored(mean(scores), scores, tuple(reason for _, reason in images))

    def score_all(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> dict[str, Scored]:
        """{prompt's id: its scores} of one sampling seed, for rules that use all prompts together.

        Raises:
            ValueError: see `score`.
        """
        return {prompt["id"]: self.score(prompt, judged[prompt["id"]]) for prompt in prompts}

    def measures(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> dict[str, float]:
        """Further numbers of one sampling seed that are not in [0, 1], such as distances."""
        return {}

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        """{name: text} of the official code's result files for one sampling seed; {} if it writes none.

        From these, the official summary scripts compute what `summarise` returns with mode="official". Names have no
        time stamp; paths of images are from `picture_path`.

        Args:
            judged: {prompt's id: answers}, at least one image of each.
            label: of the model, in files that name it.
        """
        return {}

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """The benchmark's scores. Here: the mean over prompts, or over categories (`pooling`), of the means of their
        images. An image that was not judged is left out ("official") or has the score 0 ("fixed").

        Args:
            prompts: of the run.
            judged: {prompt's id: answers}.
            mode: "official" repeats the official code's bugs and drops failed images; "fixed" does neither.

        Returns:
            {"score", "categories": {name: score}, "expected", "scored", "failed": numbers of images (of prompts, where
            the rule scores prompts only)}, and what else the rule has. A score is None where the official code stops, and
            "notes" then says why.

        Raises:
            ValueError: nothing to score, or answers to an unknown prompt.
        """
        check_known(prompts, judged)
        scored = self.score_all(prompts, complete(prompts, judged))
        images = [score for one in scored.values() for score in one.images]
        failed = images.count(None)
        if failed == len(images):
            raise ValueError(f"none of {len(images)} images was judged")
        means: list[float | None] = []
        groups: dict[str, list[float | None]] = {tag: [] for tag in self.tasks}
        for prompt in prompts:
            values = scored[prompt["id"]].images
            means.append(mean([0.0 if value is None and mode == "fixed" else value for value in values]))
            groups.setdefault(str(prompt["tag"]), []).append(means[-1])
        categories = {tag: score for tag, values in groups.items() if (score := mean(values)) is not None}
        whole = mean(list(categories.values()) if self.pooling == "categories" else means)
        assert whole is not None  # an image was judged
        return {
            "score": self.scale * whole,
            "categories": {tag: self.scale * score for tag, score in categories.items()},
            "expected": len(images),
            "scored": len(images) - failed,
            "failed": failed,
        }


def required(path: str | Path | None, benchmark: Benchmark) -> Path:
    """`path`, which must exist.

    Raises:
        ValueError: it is None or missing; says which file of which repository is needed.
    """
    if path is None:
        raise ValueError(f"benchmark {benchmark.name!r} needs the path of its prompt data: {benchmark.data}")
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; benchmark {benchmark.name!r} needs {benchmark.data}")
    return Path(path)


def check_known(prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> None:
    """Raises:
    ValueError: answers to a prompt that is not one of `prompts`, or two prompts of one id.
    """
    ids = {prompt["id"] for prompt in prompts}
    if len(ids) < len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(ids)} different ids; each prompt needs its own")
    unknown = [key for key in judged if key not in ids]
    if unknown:
        raise ValueError(f"answers to {len(unknown)} unknown prompts, such as {unknown[0]!r}; ids are {_some(ids)}")


def complete(prompts: Sequence[Prompt], judged: Mapping[str, Judged]) -> dict[str, Judged]:
    """`judged` for every prompt: a prompt without answers gets as many missing images as the fullest other has
    images."""
    share = {prompt["id"]: prompt.get("images", 1) for prompt in prompts}
    images = max((-(-len(answers.images) // share[key]) for key, answers in judged.items() if key in share), default=1)
    return {key: judged.get(key) or Judged((None,) * (images * share[key])) for key in share}


def _some(ids: set[str]) -> str:
    return ", ".join(sorted(ids)[:3]) + (", ..." if len(ids) > 3 else "")


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
