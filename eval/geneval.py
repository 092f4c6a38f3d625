"""GenEval's decision rule, prompt files, folder layout and summary, without any model.

    objects of an image + metadata of its prompt --judge_image--> right or wrong, and why --summarise--> scores

Objects, as a detector gives them and `judge_image` takes them:

    {class name: [{"box": [x0, y0, x1, y1], "score": 0.97, "color": "red"}, ...]}

`box` is in pixels, y downwards; `score` lies in [0, 1] (left out: certain); `color` is needed by prompts that ask for
one only, and only for the objects that are looked at. A bare sequence of 4 or 5 numbers stands for box (and score).

Source: the rule of github.com/djghosh13/geneval at af4902f. It is followed to the letter, oddities included: see
`judge_image`. Scores are compared in float32, as the official arrays are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# The order in which the official message lists what was found.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1

Objects = Mapping[str, Sequence[Any]]


def relative_position(
    box_a: Sequence[float], box_b: Sequence[float], position_threshold: float = POSITION_THRESHOLD
) -> list[str]:
    """Where A is relative to B: none, one or two of "left of", "right of", "above", "below", sorted.

    The offset between the centres shrinks on each axis by `position_threshold` x (both extents), not below 0; what is
    left, divided by the length of the unshrunk offset, must lie strictly beyond 0.5.

    Args:
        box_a, box_b: (x0, y0, x1, y1, ...) in pixels, y downwards; an inverted box has the extent of the upright one.
        position_threshold: share of the summed extents that an offset must exceed.

    Raises:
        ValueError: a box of fewer than four numbers.
    """
    for box in (box_a, box_b):
        if len(box) < 4:
            raise ValueError(f"box {list(box)} must be (x0, y0, x1, y1)")
    # One array of both keeps their dtype: float32 boxes are computed in float32, as the official code does.
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


def filter_detections(
    detections: Sequence[Any], threshold: float = THRESHOLD, max_objects: int = MAX_OBJECTS
) -> list[dict[str, Any]]:
    """One class's detections, scores strictly above `threshold` (both float32), highest first, at most `max_objects`.

    A list already in falling order keeps its order among ties, so that filtering twice changes nothing; otherwise
    ties come out in the official order (an ascending sort, reversed).
    """
    found = [_as_object(d) for d in detections]
    scores = np.array([d["score"] for d in found], dtype=np.float32)
    order = np.arange(len(found)) if (scores[1:] <= scores[:-1]).all() else np.argsort(scores)[::-1]
    keep = order[scores[order] > np.float32(threshold)][:max_objects]
    return [found[i] for i in keep]


def judge_image(
    objects: Objects,
    metadata: Mapping[str, Any],
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    position_threshold: float = POSITION_THRESHOLD,
    classify_colors: Callable[[str, list[dict[str, Any]]], list[str]] | None = None,
) -> dict[str, Any]:
    """Whether an image shows what its prompt asks for, by GenEval's rule.

    All `include` clauses must hold and no `exclude` clause. A clause looks at the `count` best objects of its class
    only, and knows nothing of the other clauses; more objects than asked for are wrong with an `exclude` only.

    Args:
        objects: {class: detections} (see the top of this file), before or after filtering.
        metadata: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier
            clause]}], "exclude"?: [{"class", "count"}]}; other keys are not read.
        threshold, counting_threshold: a detection's score must lie strictly above; the latter for the tag "counting".
        max_objects: detections kept of each class.
        position_threshold: see `relative_position`.
        classify_colors: (class, objects looked at) -> their colours; when left out, each object says its own.

    Returns:
        {"correct": bool, "reason": why not, one line for each clause that fails, "" if none,
        "found": {class: number of objects above the threshold}}

    Raises:
        ValueError: a malformed clause or object, or a colour asked for and not known.
    """
    limit = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {name: filter_detections(found, limit, max_objects) for name, found in objects.items()}
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
        found = len(kept.get(name, []))
        if found >= count:
            reasons.append(f"expected {name}<{count}, found {found}")
    return {
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "found": {name: len(found) for name, found in kept.items() if found},
    }


def _count_reason(name: str, count: int, looked_at: list[dict[str, Any]]) -> str:
    return f"expected {name}>={count}, found {len(looked_at)}" if len(looked_at) < count else ""


def _color_reason(name, count, wanted, looked_at, classify_colors) -> str:
    if classify_colors is not None:
        colors = classify_colors(name, looked_at)
    else:
        colors = [found.get("color") for found in looked_at]
        if None in colors:
            raise ValueError(f"the prompt asks for a {wanted} {name}, but a detected {name} has no 'color'")
    if colors.count(wanted) >= count:
        return ""
    listed = [c for c in COLORS if c in colors] + sorted(set(colors) - set(COLORS))
    found = ", ".join(f"{colors.count(c)} {c}" for c in listed)
    return f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {found}"


def _position_reason(name, position, looked_at, matched, position_threshold) -> str:
    relation, target = position
    if not isinstance(target, int) or not 0 <= target < len(matched):
        raise ValueError(f"position {list(position)!r} of {name} must refer to one of {len(matched)} earlier clauses")
    if matched[target] is None:
        return f"no target for {name} to be {relation}"
    for found in looked_at:
        for other in matched[target]:
            relations = relative_position(found["box"], other["box"], position_threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return ""


def _clause(clause: Mapping[str, Any]) -> tuple[str, int]:
    try:
        return clause["class"], clause["count"]
    except KeyError as error:
        raise ValueError(f"clause {dict(clause)!r} has no {error}; it needs 'class' and 'count'") from None


def _as_object(detection: Any) -> dict[str, Any]:
    if isinstance(detection, Mapping):
        if "box" not in detection:
            raise ValueError(f"detection {dict(detection)!r} has no 'box' (x0, y0, x1, y1)")
        return {**detection, "score": detection.get("score", 1.0)}
    if len(detection) not in (4, 5):
        raise ValueError(f"detection {detection!r} must be a mapping with 'box', or 4 or 5 numbers (box, score)")
    return {"box": detection[:4], "score": detection[4] if len(detection) == 5 else 1.0}


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """GenEval's summary of judged images.

    Args:
        rows: one mapping per image with "tag", "correct", and "metadata" (the prompt's, a dict or JSON) or "prompt";
            images of equal metadata are images of one prompt.

    Returns:
        {"overall": plain mean of the tasks' accuracies, "tasks": {tag: {"accuracy", "correct", "images", "prompts"}},
        "image_accuracy": share of right images, "prompt_accuracy": share of prompts with any right image,
        "correct_images", "images", "correct_prompts", "prompts": counts, "missing_tasks": of the six, those without
        an image (`overall` leaves them out, as the official summary does)}

    Raises:
        ValueError: no rows.
    """
    tasks: dict[str, dict[Any, list[bool]]] = {}
    for row in rows:
        metadata = row.get("metadata", row.get("prompt"))
        key = metadata if isinstance(metadata, (str, type(None))) else json.dumps(metadata, sort_keys=True)
        tasks.setdefault(row["tag"], {}).setdefault(key, []).append(bool(row["correct"]))
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


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """A prompt file: one metadata object per line, as GenEval's evaluation_metadata.jsonl.

    Raises:
        ValueError: the file is absent or empty, or a line is not a prompt; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of prompts (one JSON object per line)")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            metadata = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(metadata, dict) or not {"tag", "prompt", "include"} <= metadata.keys():
            raise ValueError(f"{path}, line {number}: a prompt needs 'tag', 'prompt' and 'include'")
        prompts.append(metadata)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def expected_images(metadata: Mapping[str, Any], images_per_prompt: int = 1) -> int:
    """Images a run makes of a prompt: `images_per_prompt`, times the prompt's own "images" where it has one."""
    return images_per_prompt * metadata.get("images", 1)


def walk_layout(
    images_dir: str | Path,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    images_per_prompt: int | None = None,
    missing: Literal["error", "official"] = "error",
) -> list[dict[str, Any]]:
    """The images of DIR/00000/{metadata.jsonl, samples/0000.png ...}, in order.

    As in the official code, a folder counts if its name `isdigit()`, and a file if its name starts with digits and
    ".png"; other entries are passed over.

    Args:
        prompts: what should be there (folder n is prompt n); when left out, the folders say.
        images_per_prompt: see `expected_images`; when left out, the fullest folder says.
        missing: "error" refuses a missing prompt or image; "official" scores what is there, on a smaller denominator.

    Returns:
        one {"folder", "metadata", "path"} per image; `folder` is the folder's name.

    Raises:
        ValueError: nothing to score, a folder without metadata or of another prompt, or (missing="error") a gap.
    """
    if missing not in ("error", "official"):
        raise ValueError(f"missing={missing!r} must be 'error' or 'official'")
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise ValueError(f"{images_dir} is not a folder of images")
    names = [p.name for p in images_dir.iterdir() if p.is_dir() and p.name.isdigit()]
    folders = []
    for name in sorted(names, key=lambda n: (len(n), n)):
        folder = images_dir / name
        file = folder / "metadata.jsonl"
        if not file.is_file():
            raise ValueError(f"{folder} has no metadata.jsonl")
        metadata = json.loads(file.read_text(encoding="utf-8"))
        files = [p for p in folder.glob("samples/*") if p.is_file() and re.match(r"\d+\.png", p.name)]
        folders.append((name, metadata, sorted(files, key=lambda p: (len(p.name), p.name))))
    if prompts is not None:
        _check_prompts(images_dir, folders, prompts, missing)
    if missing == "error":
        if images_per_prompt is None:
            images_per_prompt = max((-(-len(f) // m.get("images", 1)) for _, m, f in folders), default=1) or 1
        for name, metadata, files in folders:
            wanted = expected_images(metadata, images_per_prompt)
            if len(files) != wanted:
                raise ValueError(
                    f"{images_dir / name} holds {len(files)} images, not {wanted}; complete or clear it, or score what "
                    "is there with missing='official' (which changes the denominator)"
                )
    found = [{"folder": name, "metadata": m, "path": path} for name, m, files in folders for path in files]
    if not found:
        raise ValueError(f"{images_dir} holds no image to score (expected 00000/samples/0000.png)")
    return found


def _check_prompts(images_dir, folders, prompts, missing) -> None:
    # isdigit() holds for superscripts too, which are no numbers of prompts.
    present = {int(name) if name.isdecimal() else len(prompts): metadata for name, metadata, _ in folders}
    for index, metadata in present.items():
        # Through JSON: a tuple in the caller's metadata is a list in the file.
        if index >= len(prompts) or json.loads(json.dumps(prompts[index])) != metadata:
            wanted = prompts[index]["prompt"] if index < len(prompts) else "no such prompt"
            shown = metadata.get("prompt")
            raise ValueError(f"{images_dir}/{index:05d} shows {shown!r}, not prompt {index} ({wanted!r})")
    absent = [i for i in range(len(prompts)) if i not in present]
    if absent and missing == "error":
        raise ValueError(
            f"{images_dir} lacks {len(absent)} of {len(prompts)} prompts, the first {absent[0]:05d} "
            f"({prompts[absent[0]]['prompt']!r}); make them, or score with missing='official'"
        )
