"""DPG-Bench's and OneIG-Bench's scores against slow oracles, written from the descriptions of their rules."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import dpg, oneig
from eval.benchmarks.base import Judged
from eval.benchmarks.dpg import BENCHMARK as DPG
from eval.benchmarks.oneig import ENGLISH
from eval.official.oneig_files import STYLES

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
randoms = st.integers(0, 2**64 - 1).map(random.Random)  # cases are drawn by Python's generator, which is faster
NO = ["no", "Yes", "yes.", " yes", "YES", ""]  # DPG-Bench takes exactly "yes"
OTHERS = ["No", "yes", "Yes.", " Yes", "YES", ""]  # OneIG-Bench exactly "Yes"


def question_tree(rng, qids: list[int]) -> dict[int, list[int]]:
    """{qid: parents}, earlier and later ones, itself, and 0 for none, in the order of the file."""
    order = rng.sample(qids, len(qids))
    return {qid: [rng.choice([0, 0, *qids]) for _ in range(rng.randrange(1, 4))] for qid in order}


def answers_to(rng, qids, images: int, yes: str, no: list[str]) -> dict[int, list[str]]:
    share = rng.choice([0.5, 0.8, 0.95])
    return {qid: [yes if rng.random() < share else rng.choice(no) for _ in range(images)] for qid in qids}


def cascading(answers, dependency, image: int) -> dict[int, bool]:
    """Whether each question scores: its answer is yes, and so is that of each parent with what stands before it in the
    file already decided. A parent further down counts by its own answer."""
    at = {qid: i for i, qid in enumerate(dependency)}

    def scores(qid: int) -> bool:
        if answers[qid][image] != "yes":
            return False
        return all(
            scores(parent) if at[parent] < at[qid] else answers[parent][image] == "yes"
            for parent in dependency[qid]
            if parent != 0
        )

    return {qid: scores(qid) for qid in dependency}


@SETTINGS
@given(randoms)
def test_a_question_of_dpg_counts_only_if_its_parents_do(rng):
    qids, images = rng.sample(range(1, 20), rng.randrange(1, 8)), rng.randrange(1, 5)
    dependency, answers = question_tree(rng, qids), answers_to(rng, qids, images, "yes", NO)
    decided = [cascading(answers, dependency, image) for image in range(images)]
    result = dpg.score_sample(answers, dependency)
    per_image = [Fraction(sum(one.values()), len(qids)) for one in decided]
    assert result["per_image"] == pytest.approx([float(share) for share in per_image], abs=1e-12), (answers, dependency)
    assert result["score"] == pytest.approx(float(sum(per_image) / images), abs=1e-12)
    assert result["raw"] == {qid: float(answers[qid][-1] == "yes") for qid in qids}


def dpg_prompts(rng) -> list[dict]:
    kinds = ["entity - whole", "entity - part", "attribute - color", "relation - spatial"]
    prompts = []
    for i in range(rng.randrange(1, 5)):
        dependency = question_tree(rng, list(range(1, rng.randrange(2, 6))))
        rows = [[q, f"{rng.choice(kinds)} (x)", parents, f"question {q}?"] for q, parents in dependency.items()]
        prompts.append({"id": f"item{i}", "prompt": f"prompt {i}", "tag": "dpg", "questions": rows})
    return prompts


def dpg_judged(rng, prompts, images: int):

    result = {}
    for prompt in prompts:
        answers = answers_to(rng, [row[0] for row in prompt["questions"]], images, "yes", NO)
        result[prompt["id"]] = Judged([{str(qid): texts[i] for qid, texts in answers.items()} for i in range(images)])
    return result


@SETTINGS
@given(randoms)
def test_dpg_is_the_mean_of_its_prompts_and_its_categories_are_means_of_questions(rng):
    prompts, images = dpg_prompts(rng), rng.randrange(1, 5)
    judged = dpg_judged(rng, prompts, images)
    summary = DPG.summarise(prompts, judged, "fixed")
    means, narrow = [], {}
    for prompt in prompts:
        dependency = {row[0]: row[2] for row in prompt["questions"]}
        answers = {q: [image[str(q)] for image in judged[prompt["id"]].images] for q in dependency}
        decided = [cascading(answers, dependency, i) for i in range(images)]
        means.append(Fraction(sum(sum(one.values()) for one in decided), images * len(dependency)))
        for qid, text, _, _ in prompt["questions"]:
            for name in (text.removesuffix(" (x)"), text.partition(" -")[0]):
                narrow.setdefault(name, []).extend(one[qid] for one in decided)
        mine = DPG.score(prompt, judged[prompt["id"]])
        assert mine.score == pytest.approx(float(means[-1]), abs=1e-12)
        assert all((reason == "") == all(image[str(q)] == "yes" for q in dependency) for reason, image in zip(mine.reasons, judged[prompt["id"]].images, strict=True))  # fmt: skip
    assert summary["score"] == pytest.approx(float(100 * sum(means) / len(means)), abs=1e-9)
    assert summary["categories"] == pytest.approx({k: 100 * sum(v) / len(v) for k, v in narrow.items()}, abs=1e-9)


@SETTINGS
@given(randoms)
def test_neither_the_order_of_prompts_nor_of_images_nor_of_answers_changes_a_fixed_score_of_dpg(rng):

    prompts = dpg_prompts(rng)
    judged = dpg_judged(rng, prompts, rng.randrange(1, 5))
    other = {}
    for key in rng.sample(sorted(judged), len(judged)):
        images = [dict(rng.sample(sorted(image.items()), len(image))) for image in judged[key].images]
        other[key] = Judged(rng.sample(images, len(images)))
    before = DPG.summarise(prompts, judged, "fixed")
    after = DPG.summarise(rng.sample(prompts, len(prompts)), other, "fixed")
    assert after["score"] == pytest.approx(before["score"], abs=1e-9)
    assert after["categories"] == pytest.approx(before["categories"], abs=1e-9)


@SETTINGS
@given(randoms)
def test_a_question_of_oneig_counts_only_if_its_parents_own_answers_are_yes(rng):
    qids, tiles = list(range(1, rng.randrange(2, 9))), rng.randrange(1, 5)
    dependency, answers = question_tree(rng, qids), answers_to(rng, qids, tiles, "Yes", OTHERS)
    if rng.random() < 0.5:
        dependency.popitem()  # no entry: no parents
        dependency = {qid: [*parents, 99] for qid, parents in dependency.items()}  # a parent that is no question
    counted = 0
    for tile in range(tiles):
        yes = {qid for qid in qids if answers[qid][tile] == "Yes"}
        counted += sum(qid in yes and {p for p in dependency.get(qid, ()) if p in qids} <= yes for qid in qids)
    expected = float(Fraction(counted, len(qids) * tiles))
    assert oneig.alignment_score(answers, dependency) == pytest.approx(expected, abs=1e-12)


def edits(a: str, b: str) -> int:
    """The table of edit distances, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@SETTINGS
@given(randoms)
def test_the_edit_distance_is_that_of_the_table_and_a_metric(rng):
    a, b, c = ("".join(rng.choice("ab 中") for _ in range(rng.randrange(40))) for _ in range(3))
    b = a[rng.randrange(len(a) + 1) :] + b if rng.random() < 0.5 else b
    distance = oneig.levenshtein_distance(a, b)
    assert distance == edits(a, b) == oneig.levenshtein_distance(b, a)
    assert oneig.levenshtein_distance(a, c) <= distance + oneig.levenshtein_distance(b, c)


@SETTINGS
@given(randoms)
def test_oneigs_text_score_is_the_formula_over_all_tiles(rng):
    words = ["SALE", "open", "Cafe", "42"]
    wanted = {
        str(i): " ".join(rng.choice(words) for _ in range(rng.randrange(1, 5))) for i in range(rng.randrange(1, 5))
    }
    ocr = {
        key: [text if rng.random() < 0.4 else " ".join(rng.choice([*words, "x"]) for _ in range(3)) for _ in range(rng.randrange(5))]
        for key, text in wanted.items()
    }  # fmt: skip
    tiles = [(text, read) for key, text in wanted.items() for read in ocr[key]]
    if not tiles:
        with pytest.raises(ValueError, match="has a text to compare"):
            oneig.summarise_text(wanted, ocr, "EN", "fixed")
        return
    distances = [edits(read, text) for text, read in tiles]
    matched = 0
    for text, read in tiles:
        left = read.split()
        for word in text.split():
            if word in left:
                left.remove(word)
                matched += 1
    ed = Fraction(sum(distances), len(tiles))
    cr, wac = Fraction(distances.count(0), len(tiles)), Fraction(matched, sum(len(text.split()) for text, _ in tiles))
    for language, most in (("EN", 100), ("ZH", 50)):
        summary = oneig.summarise_text(wanted, ocr, language, "fixed")
        assert (summary["ED"], summary["CR"], summary["WAC"]) == pytest.approx((float(ed), float(cr), float(wac)))
        assert summary["score"] == pytest.approx(float(1 - min(most, ed) * (1 - cr) * (1 - wac) / most), abs=1e-12)
        assert summary["failed"] == [key for key, texts in ocr.items() if not texts]


@SETTINGS
@given(randoms)
def test_means_of_oneig_leave_out_prompts_without_a_score_and_group_by_class_and_style(rng):
    names = [f"{rng.choice(['anime', 'human', 'object'])}_{i:03d}" for i in range(rng.randrange(1, 8))]
    scores = {name: rng.choice([None, 0.0, 0.25, 0.5, 1.0]) for name in names}
    present = {name: value for name, value in scores.items() if value is not None}
    summaries = (oneig.summarise_alignment, oneig.summarise_diversity, oneig.summarise_reasoning)
    for summarise in summaries:
        if not present:
            with pytest.raises(ValueError, match="has a score"):
                summarise(scores)
            continue
        summary = summarise(dict(rng.sample(sorted(scores.items()), len(scores))))
        assert summary["score"] == pytest.approx(sum(present.values()) / len(present), abs=1e-12)
        assert summary["scored"] == len(present) and set(summary["failed"]) == set(scores) - set(present)
        for name, mean in summary.get("classes", {}).items():
            values = [value for key, value in present.items() if key.startswith(name)]
            assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)
    styles = {name: rng.choice([None, float("nan"), "", *STYLES[:2]]) for name in names}
    styled = {name: value for name, value in present.items() if styles[name] in STYLES}
    if styled:
        summary = oneig.summarise_style(styles, scores)
        assert summary["score"] == pytest.approx(sum(styled.values()) / len(styled), abs=1e-12)
        for style, mean in summary["styles"].items():
            values = [value for name, value in styled.items() if styles[name] == style]
            assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)


@SETTINGS
@given(randoms)
def test_a_style_is_the_mean_of_the_best_similarities_none_below_zero(rng):
    tiles, references = rng.randrange(1, 4), rng.randrange(1, 4)
    csd, se = ([[rng.uniform(-1, 1) for _ in range(3)] for _ in range(tiles)] for _ in range(2))
    csd_refs, se_refs = ([[rng.uniform(-1, 1) for _ in range(3)] for _ in range(references)] for _ in range(2))

    def best(vector, others):
        vector, others = np.float32(vector).tolist(), np.float32(others).tolist()
        return max(0.0, *(sum(x * y for x, y in zip(vector, other, strict=True)) for other in others))

    expected = [(best(a, csd_refs) + best(b, se_refs)) / 2 for a, b in zip(csd, se, strict=True)]
    assert oneig.style_score(csd, se, csd_refs, se_refs) == pytest.approx(sum(expected) / tiles, abs=1e-6)


@SETTINGS
@given(randoms)
def test_oneigs_overall_score_is_the_mean_of_the_dimensions_that_were_judged(rng):

    skills = {skill for skill in ("vqa", "ocr", "reasoning", "style", "diversity") if rng.random() < 0.7}
    prompts = [
        {"id": "anime_001", "prompt": "p", "tag": "anime", "questions": [[1, [0], "a?"], [2, [1], "b?"]], "style": STYLES[0]},
        {"id": "text_001", "prompt": "p", "tag": "text", "text_content": "OPEN now"},
        {"id": "reasoning_001", "prompt": "p", "tag": "reasoning", "answer": "x"},
    ]  # fmt: skip
    judged, expected = {}, {}
    for prompt in prompts:
        images = []
        for _ in range(4):
            replies = {"1": rng.choice(["Yes", "No"]), "2": rng.choice(["Yes", "No"]), "ocr": rng.choice(["OPEN now", "x"]), "reasoning": rng.random(), "style": rng.random()}  # fmt: skip
            asked = [q.key for q in ENGLISH.questions(prompt, {}) if q.judge in skills and not q.together]
            images.append({key: replies[key] for key in asked})
        together = {"diversity": [rng.random() for _ in range(6)]} if "diversity" in skills else {}
        judged[prompt["id"]] = Judged(images, together)
    anime, text, reasoning = (judged[prompt["id"]] for prompt in prompts)
    if "vqa" in skills:
        yes = [(image["1"] == "Yes") + (image["1"] == image["2"] == "Yes") for image in anime.images]
        expected["alignment"] = sum(yes) / 8
    if "ocr" in skills:
        right = [image["ocr"] == "OPEN now" for image in text.images]
        share = sum(right) / 4
        expected["text"] = 1 - (8 * (1 - share)) * (1 - share) * (1 - share) / 100  # "x" is 8 edits away
    if "reasoning" in skills:
        expected["reasoning"] = sum(image["reasoning"] for image in reasoning.images) / 4
    if "style" in skills:
        expected["style"] = sum(image["style"] for image in anime.images) / 4
    if "diversity" in skills:
        expected["diversity"] = sum(sum(one.together["diversity"]) / 6 for one in judged.values()) / 3
    if not expected:
        with pytest.raises(ValueError, match="has an image that was judged"):
            ENGLISH.summarise(prompts, judged, "fixed")
        return
    summary = ENGLISH.summarise(prompts, judged, "fixed")
    assert summary["categories"] == pytest.approx(expected)
    assert summary["score"] == pytest.approx(sum(expected.values()) / len(expected))
    assert set(summary["missing_dimensions"]) == set(oneig.DIMENSIONS) - set(expected)
