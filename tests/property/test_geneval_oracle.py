"""GenEval's decision against a slow oracle, written from the description of the rule, in exact arithmetic."""

from __future__ import annotations

import random
import struct
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from eval.geneval import COLORS, TASKS, filter_detections, judge_image, relative_position, summarise

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CLASSES = ("dog", "cat", "traffic light")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# The thresholds themselves, the nearest doubles above, which are the thresholds in float32, and equal scores.
SCORES = [0.1, 0.3, 0.30000000000000004, 0.31, 0.5, 0.9, 0.9000000000000001, *[0.91] * 4, *[1.0] * 4]

# Cases are drawn by Python's generator: Hypothesis takes ten times as long to draw one.
randoms = st.integers(0, 2**64 - 1).map(random.Random)


def box(rng) -> list[int]:
    """On a coarse grid, so that boxes often coincide, touch and stand at the thresholds."""
    return [10 * rng.randrange(13) for _ in range(4)]


def detections(rng, count: int) -> list[dict]:
    return [{"box": box(rng), "score": rng.choice(SCORES), "color": rng.choice(COLORS[:2])} for _ in range(count)]


def objects(rng) -> dict[str, list[dict]]:
    found = {name: detections(rng, rng.choice([0, 1, 1, 2, 3, 4, 20])) for name in CLASSES if rng.random() < 0.8}
    if rng.random() < 0.5:  # as a detector gives them, and as the filter leaves them
        found = {name: sorted(items, key=lambda item: -item["score"]) for name, items in found.items()}
    return found


def prompt_of(rng) -> dict:
    include = []
    for i in range(rng.choice([1, 2, 2, 3])):
        clause = {"class": rng.choice(CLASSES), "count": rng.choice([1, 1, 1, 2, 3])}
        extra = rng.choice(["", "color", "position", "position"] if i else ["", "", "color"])
        if extra == "color":
            clause["color"] = rng.choice(COLORS[:2])
        if extra == "position":
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(i)]
        include.append(clause)
    exclude = [
        {"class": rng.choice(CLASSES), "count": rng.choice([1, 2, 3, 16, 17])} for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    return {"tag": rng.choice([*TASKS, "counting", "counting"]), "include": include, "exclude": exclude}


# ---- the oracle


def single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def ranked(items: list[dict], threshold: float) -> list[dict]:
    """Insertion sort: an item goes before the first that is not above it, so that the later of equal ones comes first."""
    result: list[dict] = []
    for item in items:
        at = next((i for i, other in enumerate(result) if single(other["score"]) <= single(item["score"])), len(result))
        result.insert(at, item)
    return [item for item in result if single(item["score"]) > single(threshold)][:16]


def in_order(items: list[dict]) -> bool:
    return all(single(a["score"]) >= single(b["score"]) for a, b in zip(items, items[1:], strict=False))


def relations_of(a: list[int], b: list[int]) -> list[str] | None:
    """None where a share is so near 1/2 that float64 may be on either side."""
    shift, total = {}, Fraction(0)
    for axis in (0, 1):
        offset = Fraction(a[axis] + a[axis + 2] - b[axis] - b[axis + 2], 2)
        margin = Fraction(1, 10) * (abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis]))
        left = max(abs(offset) - margin, Fraction(0))
        shift[axis] = left if offset > 0 else -left
        total += offset**2
    if all(abs(value) < Fraction(1, 1000) for value in shift.values()):
        return []
    if any(value and abs(4 * value**2 / total - 1) < Fraction(1, 10**9) for value in shift.values()):
        return None
    names = {0: ("left of", "right of"), 1: ("above", "below")}
    return sorted(names[axis][value > 0] for axis, value in shift.items() if 4 * value**2 > total)


def oracle(found: dict, prompt: dict) -> list[str]:
    """The reasons."""
    threshold = 0.9 if prompt["tag"] == "counting" else 0.3
    # A list in falling order is one that the filter has ordered already.
    kept = {
        name: [d for d in items if single(d["score"]) > single(threshold)][:16]
        if in_order(items)
        else ranked(items, threshold)
        for name, items in found.items()
    }
    reasons, good = [], {}
    for i, clause in enumerate(prompt["include"]):
        name, count = clause["class"], clause["count"]
        best = kept.get(name, [])[:count]
        before = len(reasons)
        if len(best) < count:
            reasons.append(f"expected {name}>={count}, found {len(best)}")
        elif "color" in clause:
            named = [d["color"] for d in best]
            right = named.count(clause["color"])
            if right < count:
                counts = ", ".join(f"{named.count(color)} {color}" for color in COLORS if color in named)
                reasons.append(
                    f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {counts}"
                )
        elif "position" in clause:
            relation, target = clause["position"]
            if target not in good:
                reasons.append(f"no target for {name} to be {relation}")
            else:
                for a, b in ((a, b) for a in best for b in good[target]):
                    relations = relations_of(a["box"], b["box"])
                    assume(relations is not None)
                    if relation not in relations:
                        text = " and ".join(relations)
                        reasons.append(f"expected {name} {relation} target, found {text} target")
                        break
        if len(reasons) == before:
            good[i] = best
    for clause in prompt["exclude"]:
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return reasons


# ---- the properties


@SETTINGS
@given(randoms)
def test_the_decision_and_its_reasons_are_the_oracles(rng):
    found, prompt = objects(rng), prompt_of(rng)
    result, expected = judge_image(found, prompt), oracle(found, prompt)
    assert result["reason"] == "\n".join(expected) and result["correct"] == (not expected), (found, prompt)


@SETTINGS
@given(randoms)
def test_detections_are_ordered_as_by_insertion_on_every_machine_and_at_most_sixteen(rng):
    items, threshold = detections(rng, rng.randrange(24)), rng.choice([0.3, 0.9])
    assert filter_detections(items, threshold) == ranked(items, threshold), items


@SETTINGS
@given(randoms)
def test_positions_are_the_oracles_and_those_of_exchanged_boxes_are_opposite(rng):
    a, b = box(rng), box(rng)
    seen, expected = relative_position(a, b), relations_of(a, b)
    assert sorted(OPPOSITE[relation] for relation in seen) == relative_position(b, a), (a, b)
    assert expected is None or seen == expected, (a, b)


def test_one_half_of_the_offset_is_no_relation_and_more_is_one():
    """An offset of (30, 40) is 50 long. Extents of 50 leave 25 and 35 of it, extents of 49 leave 25.1 and 35.1."""
    assert relative_position([30, 40, 55, 65], [0, 0, 25, 25]) == ["below"]
    assert relative_position([30.5, 40.5, 54.5, 64.5], [0, 0, 25, 25]) == ["below", "right of"]


@SETTINGS
@given(randoms)
def test_neither_the_order_of_classes_nor_what_is_below_the_threshold_or_of_other_classes_changes_a_decision(rng):
    found, prompt = objects(rng), prompt_of(rng)
    more = {name: list(found[name]) for name in rng.sample(sorted(found), len(found))}
    for items in more.values():  # behind the others: an ordered list stays one
        items.extend([{"box": box(rng), "score": 0.05, "color": "red"}] * rng.randrange(3))
    more["zebra"] = [{"box": [0, 0, 9, 9], "score": 1.0}]
    assume(all(in_order(found[name]) == in_order(more[name]) for name in found))
    before, after = judge_image(found, prompt), judge_image(more, prompt)
    assert (after["correct"], after["reason"]) == (before["correct"], before["reason"]), (found, more, prompt)


@SETTINGS
@given(randoms)
def test_a_decision_is_that_of_its_clauses_alone_where_none_refers_to_another(rng):
    found, prompt = objects(rng), prompt_of(rng)
    plain = [clause for clause in prompt["include"] if "position" not in clause]
    alone = [judge_image(found, {"tag": prompt["tag"], "include": [clause]}) for clause in plain]
    alone += [judge_image(found, {"tag": prompt["tag"], "exclude": [clause]}) for clause in prompt["exclude"]]
    whole = judge_image(found, {**prompt, "include": plain})
    assert whole["correct"] == all(one["correct"] for one in alone)
    assert whole["reason"] == "\n".join(one["reason"] for one in alone if one["reason"])


@SETTINGS
@given(randoms)
def test_the_summary_is_the_plain_mean_of_the_tasks_shares_in_any_order_of_images(rng):
    drawn = [(rng.choice(TASKS), rng.randrange(4), rng.random() < 0.6) for _ in range(rng.randrange(1, 40))]
    listed = [{"tag": tag, "metadata": f"{tag} {prompt}", "correct": right} for tag, prompt, right in drawn]
    summary = summarise(listed)
    shares = {}
    for task in {tag for tag, _, _ in drawn}:
        verdicts = [right for tag, _, right in drawn if tag == task]
        shares[task] = Fraction(sum(verdicts), len(verdicts))
    assert summary["overall"] == pytest.approx(float(sum(shares.values()) / len(shares)), abs=1e-12)
    assert summary["correct_prompts"] == len({(tag, prompt) for tag, prompt, right in drawn if right})
    assert summary["missing_tasks"] == [task for task in TASKS if task not in shares]
    rng.shuffle(listed)
    assert summarise(listed) == summary
