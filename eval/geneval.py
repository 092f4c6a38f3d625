"""GenEval's decision rule, prompt files, folder layout and summary, without any model.

    objects of an image + metadata of its prompt --judge_image--> right or wrong, and why --summarise--> scores

Objects, as a detector gives them and `judge_image` takes them:

    {class name: [{"box": [x0, y0, x1, y1], "score": 0.97, "color": "red"}, ...]}

`box` is in pixels, y downwards; `score` is in [0, 1] (left out: certain); `color` is needed by prompts that ask for
one only, and only for the objects that the rule uses. A plain sequence of 4 or 5 numbers means box (and score).

Source: the rule of github.com/djghosh13/geneval at af4902f. It is followed exactly, including its oddities: see
`judge_image`. Scores are compared in float32, as the official arrays are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.official.geneval_files import (
    expected_images,
    load_prompts,
    read_results,
    walk_layout,
    write_results,
)

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "box_iou",
    "crop_object",
    "expected_images",
    "filter_detections",
    "judge_image",
    "load_prompts",
    "read_results",
    "relative_position",
    "result_row",
    "summarise",
    "summary_text",
    "walk_layout",
    "write_results",
]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0  # no detection is dropped for its overlap
POSITION_THRESHOLD = 0.1
BACKGROUND = "#999"  # background of the crops whose colour is classified

Objects = Mapping[str, Sequence[Any]]


def relative_position(
    box_a: Sequence[float], box_b: Sequence[float], position_threshold: float = POSITION_THRESHOLD
) -> list[str]:
    """The position of A relative to B: none, one or two of "left of", "right of", "above", "below", sorted.

    On each axis the offset between the centres is reduced by `position_threshold` x (both extents), not below 0; the
    rest, divided by the length of the original offset, must be strictly above 0.5.

    Args:
        box_a, box_b: (x0, y0, x1, y1, ...) in pixels, y downwards; an inverted box has the extent of the upright one.
        position_threshold: share of the summed extents that an offset must exceed.

    Raises:
        ValueError: a box of fewer than four numbers.
    """
    for box in (box_a, box_b):
        if len(box) < 4:
            raise ValueError(f"box {list(box)} must be (x0, y0, x1, y1)")
    # One array of both keeps their dtype: the official code computes float32 boxes in float32.
    corners = np.array([box_a[:4], box_b[:4]]).reshape(2, 2, 2)  # box, corner, axis
    centers = corners.mean(axis=1)
    extents = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - position_threshold * extents.sum(axis=0), 0)
    if (np.abs(shrunk) < 1e-3).all():
        return []
    dx, dy = shrunk / np.linalg.norm(offset)
    holds = {"above": dy < -0.5, "below": dy > 0.5, "left of": dx < -0.5, "right of": dx > 0.5}
    return [relation for relation, true in holds.items() if true]


def box_iou(box_a: Sequence[float], box_b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1, ...) that include their last pixel: a side measures
    x1 - x0 + 1. In the dtype of the boxes; 0 if neither has an area."""
    both = _area((max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3])))
    union = _area(box_a) + _area(box_b) - both
    return both / union if union else 0


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def filter_detections(
    detections: Sequence[Any],
    threshold: float = THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> list[dict[str, Any]]:
    """One class's detections, scores strictly above `threshold` (both float32), highest first, at most `max_objects`;
    of these, each drops the later ones whose IoU with it is `max_overlap` or more (1: none).

    The order is the official code's, an ascending sort, reversed: ties come out in reverse. The sort is stable here; NumPy's
    default, which the official code uses, orders some ties by its version and the CPU. To filter what may have been filtered
    before, see `kept_detections`.
    """
    scores = np.array([_score(d) for d in detections], dtype=np.float32)
    return _kept(
        detections, scores, np.argsort(scores, kind="stable")[::-1].tolist(), threshold, max_objects, max_overlap
    )


def kept_detections(
    detections: Sequence[Any],
    threshold: float = THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> list[dict[str, Any]]:
    """`filter_detections` of detections before or after filtering, as `judge_image` reads them: a list in falling order
    keeps its order among ties, so that filtering twice changes nothing."""
    scores = np.array([_score(d) for d in detections], dtype=np.float32)
    if all(a >= b for a, b in itertools.pairwise(scores.tolist())):
        return _kept(detections, scores, range(len(scores)), threshold, max_objects, max_overlap)
    return filter_detections(detections, threshold, max_objects, max_overlap)


def _kept(
    detections: Sequence[Any],
    scores: np.ndarray,
    order: Sequence[int],
    threshold: float,
    max_objects: int,
    max_overlap: float,
) -> list[dict[str, Any]]:
    rounded, limit = scores.tolist(), float(np.float32(threshold))
    kept = [as_object(detections[i]) for i in order if rounded[i] > limit][:max_objects]
    return kept if max_overlap == 1 else _suppress(kept, max_overlap)


def _suppress(detections: list[dict[str, Any]], max_overlap: float) -> list[dict[str, Any]]:
    boxes = [np.asarray(d["box"][:4], dtype=np.float32) for d in detections]  # the official boxes' dtype
    kept, rest = [], list(range(len(detections)))
    while rest:
        best, rest = rest[0], rest[1:]
        kept.append(detections[best])
        rest = [i for i in rest if box_iou(boxes[best], boxes[i]) < max_overlap]
    return kept


def judge_image(
    objects: Objects,
    metadata: Mapping[str, Any],
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    position_threshold: float = POSITION_THRESHOLD,
    max_overlap: float = MAX_OVERLAP,
    classify_colors: Callable[[str, list[dict[str, Any]]], list[str]] | None = None,
) -> dict[str, Any]:
    """Whether an image shows what its prompt asks for, by GenEval's rule.

    All `include` clauses must hold and no `exclude` clause. A clause uses only the `count` best objects of its class,
    independent of other clauses; additional objects are wrong only with an `exclude`.

    Args:
        objects: {class: detections} (see the top of this file), before or after filtering. Equal scores of a list in
            falling order keep its order; the official code, which filters once, would reverse them.
        metadata: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier
            clause]}], "exclude"?: [{"class", "count"}]}; other keys are not read.
        threshold, counting_threshold: a detection's score must be strictly above; the latter for the tag "counting".
        max_objects: detections kept of each class.
        position_threshold: see `relative_position`.
        max_overlap: see `filter_detections`.
        classify_colors: (class, used objects) -> their colours; default: the objects' own "color".

    Returns:
        {"correct": bool, "reason": why not, one line for each clause that fails, "" if none,
        "found": {class: number of objects above the threshold}}

    Raises:
        ValueError: a malformed clause or object, or a required colour is missing.
    """
    limit = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {name: kept_detections(detections, limit, max_objects, max_overlap) for name, detections in objects.items()}
    reasons: list[str] = []
    matched: list[list[dict[str, Any]] | None] = []
    for clause in metadata.get("include", ()):
        name, count = _clause(clause)
        looked_at = kept.get(name, [])[:count]
        reason = _count_reason(name, count, looked_at)
        if not reason and "color" in clause:
            reason = _color_reason(name, count, clause["color"], looked_at, classify_colors)
        if not reason and "position" in clause:
            reason = _position_reason(name, clause["position"], looked_at, matched, position_threshold)
        matched.append(None if reason else looked_at)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", ()):
        name, count = _clause(clause)
        number = len(kept.get(name, []))
        if number >= count:
            reasons.append(f"expected {name}<{count}, found {number}")
    return {
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "found": {name: len(detections) for name, detections in kept.items() if detections},
    }


def _count_reason(name: str, count: int, looked_at: list[dict[str, Any]]) -> str:
    return f"expected {name}>={count}, found {len(looked_at)}" if len(looked_at) < count else ""


def _color_reason(name, count, wanted, looked_at, classify_colors) -> str:
    if classify_colors is not None:
        colors = classify_colors(name, looked_at)
    else:
        colors = [detection.get("color") for detection in looked_at]
        if None in colors:
            raise ValueError(f"the prompt asks for a {wanted} {name}, but a detected {name} has no 'color'")
    if colors.count(wanted) >= count:
        return ""
    listed = [c for c in COLORS if c in colors] + sorted(set(colors) - set(COLORS))
    colors_seen = ", ".join(f"{colors.count(c)} {c}" for c in listed)
    return f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {colors_seen}"


def _position_reason(name, position, looked_at, matched, position_threshold) -> str:
    relation, target = position
    if not isinstance(target, int) or not 0 <= target < len(matched):
        raise ValueError(f"position {list(position)!r} of {name} must refer to one of {len(matched)} earlier clauses")
    if matched[target] is None:
        return f"no target for {name} to be {relation}"
    for detection in looked_at:
        for other in matched[target]:
            relations = relative_position(detection["box"], other["box"], position_threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return ""


def _clause(clause: Mapping[str, Any]) -> tuple[str, int]:
    try:
        return clause["class"], clause["count"]
    except KeyError as error:
        raise ValueError(f"clause {dict(clause)!r} has no {error}; it needs 'class' and 'count'") from None


def _score(detection: Any) -> float:
    if isinstance(detection, (dict, Mapping)):  # dict first: the faster check
        return detection.get("score", 1.0)
    if len(detection) not in (4, 5):
        raise ValueError(f"detection {detection!r} must be a mapping with 'box', or 4 or 5 numbers (box, score)")
    return detection[4] if len(detection) == 5 else 1.0


def as_object(detection: Any) -> dict[str, Any]:
    """A detection as a mapping with "box" and "score"; see the top of this file.

    Raises:
        ValueError: it is neither a mapping with "box" nor 4 or 5 numbers.
    """
    if isinstance(detection, (dict, Mapping)):
        if "box" not in detection:
            raise ValueError(f"detection {dict(detection)!r} has no 'box' (x0, y0, x1, y1)")
        return {**detection, "score": _score(detection)}
    return {"box": detection[:4], "score": _score(detection)}


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """GenEval's summary of judged images.

    Args:
        rows: one mapping per image with "tag", "correct", and "metadata" (the prompt's, a dict or JSON) or "prompt";
            images of equal metadata are images of one prompt.

    Returns:
        {"overall": plain mean of the tasks' accuracies, "tasks": {tag: {"accuracy", "correct", "images", "prompts"}},
        "image_accuracy": share of right images, "prompt_accuracy": share of prompts with any right image,
        "correct_images", "images", "correct_prompts", "prompts": counts, "missing_tasks": tasks of the six without an image (left out of `overall`, as in the official summary)}

    Raises:
        ValueError: no rows.
    """
    tasks: dict[str, dict[Any, list[bool]]] = {}
    for row in rows:
        tasks.setdefault(row["tag"], {}).setdefault(_prompt_key(row), []).append(bool(row["correct"]))
    if not tasks:
        raise ValueError("there are no judged images to summarise")
    rank = {tag: i for i, tag in enumerate(TASKS)}
    table = {}
    for tag in sorted(tasks, key=lambda t: (rank.get(t, len(TASKS)), t)):
        verdicts = list(tasks[tag].values())
        images, correct = sum(map(len, verdicts)), sum(map(sum, verdicts))
        table[tag] = {"accuracy": correct / images, "correct": correct, "images": images, "prompts": len(verdicts)}
    images = sum(t["images"] for t in table.values())
    prompts = sum(t["prompts"] for t in table.values())
    correct_images = sum(t["correct"] for t in table.values())
    correct_prompts = sum(any(v) for prompts_of_task in tasks.values() for v in prompts_of_task.values())
    return {
        "overall": sum(t["accuracy"] for t in table.values()) / len(table),
        "tasks": table,
        "image_accuracy": correct_images / images,
        "prompt_accuracy": correct_prompts / prompts,
        "correct_images": correct_images,
        "images": images,
        "correct_prompts": correct_prompts,
        "prompts": prompts,
        "missing_tasks": [tag for tag in TASKS if tag not in table],
    }


def summary_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The output of evaluation/summary_scores.py for a results.jsonl, byte for byte; tasks in the order of the rows.

    Args:
        rows: see `summarise`.

    Raises:
        ValueError: no rows.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[Any, bool] = {}
    for row in rows:
        correct = bool(row["correct"])
        tags.setdefault(row["tag"], []).append(correct)
        key = _prompt_key(row)
        prompts[key] = prompts.get(key, False) or correct
    if not tags:
        raise ValueError("there are no judged images to summarise")
    images, right = sum(map(len, tags.values())), sum(map(sum, tags.values()))
    lines = [
        "Summary",
        "=======",
        f"Total images: {images}",
        f"Total prompts: {len(prompts)}",
        f"% correct images: {right / images:.2%}",
        f"% correct prompts: {sum(prompts.values()) / len(prompts):.2%}",
        "",
        "Task breakdown",
        "==============",
    ]
    lines += [f"{tag:<16} = {sum(v) / len(v):.2%} ({sum(v)} / {len(v)})" for tag, v in tags.items()]
    overall = np.mean([sum(v) / len(v) for v in tags.values()])
    return "\n".join([*lines, "", f"Overall score (avg. over tasks): {overall:.5f}", ""])


def _prompt_key(row: Mapping[str, Any]) -> str | None:
    """The official key of a prompt is its metadata as JSON text."""
    metadata = row.get("metadata", row.get("prompt"))
    return metadata if isinstance(metadata, (str, type(None))) else json.dumps(metadata)


def result_row(
    filename: str, objects: Objects, metadata: Mapping[str, Any], verdict: Mapping[str, Any], **settings: Any
) -> dict[str, Any]:
    """One row for `write_results`: "details" lists the kept boxes (x0, y0, x1, y1, score) of each class.

    Args:
        filename: the image's path in the file.
        objects, metadata: the inputs of `judge_image`.
        verdict: its result.
        settings: its thresholds, if they are not the official ones.
    """
    limit = settings.get("threshold", THRESHOLD)
    if metadata["tag"] == "counting":
        limit = settings.get("counting_threshold", COUNTING_THRESHOLD)
    max_objects, max_overlap = settings.get("max_objects", MAX_OBJECTS), settings.get("max_overlap", MAX_OVERLAP)
    details = {}
    for name, detections in objects.items():
        kept = kept_detections(detections, limit, max_objects, max_overlap)
        if kept:
            details[name] = [[*map(float, d["box"][:4]), float(d["score"])] for d in kept]
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict["correct"],
        "reason": verdict["reason"],
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def crop_object(
    image: Image.Image,
    box: Sequence[float],
    mask: np.ndarray | None = None,
    background: str = BACKGROUND,
    crop: bool = True,
) -> Image.Image:
    """The picture of one object for classifying its colour: pixels outside the mask become grey, then the box is
    cropped.

    Args:
        image: any mode; read as RGB.
        box: (x0, y0, x1, y1, ...) in pixels; rounded, as Pillow does.
        mask: [height, width] bool, true on the object; None keeps the whole box.
        background: a colour for the pixels outside the mask, or "original" to leave them.
        crop: False keeps the whole image.

    Raises:
        ValueError: a mask of another size than the image.
    """
    from PIL import Image

    rgb = image.convert("RGB")
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != rgb.size[::-1]:
            raise ValueError(f"mask of shape {mask.shape} must be (height, width) = {rgb.size[::-1]} of the image")
        blank = rgb if background == "original" else Image.new("RGB", rgb.size, color=background)
        rgb = Image.composite(rgb, blank, Image.fromarray(mask))
    return rgb.crop(tuple(box[:4])) if crop else rgb
