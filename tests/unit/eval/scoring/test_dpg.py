"""DPG-Bench's rule: cascading zeroes, exact answers, and the official bugs that "fixed" corrects."""

import csv
import io
import random

import numpy as np
import pytest
from PIL import Image

from eval import dpg

HEADER = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
          "question_natural_language"]  # fmt: skip


def table(rows, header=HEADER):
    """A CSV of (item, qid, dependency, tuple) rows."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    for item, qid, dependency, text in rows:
        writer.writerow(
            [item, f"the prompt, of {item}", "", qid, dependency, "", "", text, f"Question {qid} of {item}?"]
        )
    return io.StringIO(file.getvalue(), newline="")


ROWS = [
    ("first", 1, "0", "entity - whole (table)"),
    ("first", 2, "1", "attribute - color (table, red)"),
    ("5", 1, "0", "entity - whole (sun)"),
    ("5", 2, "1", "attribute - size (sun, big)"),
    ("5", 3, "1, 2", "relation - spatial (sun, sky, in)"),
    ("ñ 7", 1, "0", "global (oil painting)"),
]


def yes(questions, images=1, no=()):
    """Answers that are yes except for (item, qid, image) in `no`."""
    return {
        item: {qid: ["no" if (item, qid, i) in no else "yes" for i in range(images)] for qid in group["qid2question"]}
        for item, group in questions.items()
    }


def test_questions_keep_their_order_parents_and_text():
    group = dpg.load_questions(table(ROWS))["5"]
    assert group["qid2dependency"] == {1: [0], 2: [1], 3: [1, 2]}
    assert group["qid2tuple"][2] == "attribute - size (sun, big)"
    assert list(group["qid2question"].items())[2] == (3, "Question 3 of 5?")
    assert all(isinstance(item, str) for item in dpg.load_questions(table(ROWS)))


def test_official_skips_the_first_row_and_fixed_does_not():
    assert list(dpg.load_questions(table(ROWS))["first"]["qid2question"]) == [2]
    assert list(dpg.load_questions(table(ROWS), "fixed")["first"]["qid2question"]) == [1, 2]
    assert "first" not in dpg.load_questions(table([ROWS[0], *ROWS[2:]]))  # it had one question only


def test_a_prompt_apart_from_its_other_rows_replaces_them_officially_only():
    rows = [("x", 1, "0", "a (b)"), ("p", 1, "0", "a (b)"), ("q", 1, "0", "a (b)"), ("p", 2, "0", "a (b)")]
    assert list(dpg.load_questions(table(rows))["p"]["qid2question"]) == [2]
    assert list(dpg.load_questions(table(rows), "fixed")["p"]["qid2question"]) == [1, 2]


def test_quoted_commas_and_newlines_belong_to_a_field(tmp_path):
    rows = [ROWS[0], ("p", 1, "0", 'entity - whole (a "b",\nc)')]
    path = tmp_path / "dpg_bench.csv"
    path.write_text("\ufeff" + table(rows).getvalue(), encoding="utf-8", newline="")
    assert dpg.load_questions(path)["p"]["qid2tuple"][1] == 'entity - whole (a "b",\nc)'
    assert dpg.load_prompts(path) == {"first": "the prompt, of first", "p": "the prompt, of p"}


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_a_table_cut_anywhere_inside_a_row_is_refused_with_its_line(tmp_path, mode):
    whole = table(ROWS).getvalue()
    start = whole.rindex("\nñ 7") + 1
    last = whole.index("Question 1 of ñ", start)  # after it, the last field is cut, which cannot be noticed
    path = tmp_path / "cut.csv"
    for end in range(start + 1, last - 1):
        path.write_text(whole[:end], encoding="utf-8", newline="")
        with pytest.raises(ValueError, match=r"cut\.csv, line 7"):
            dpg.load_questions(path, mode)


def test_a_table_cut_inside_quotes_is_refused_with_its_line():
    whole = table(ROWS).getvalue().rstrip() + ' "or, not'
    with pytest.raises(ValueError, match="line 7.*cut short"):
        dpg.load_questions(io.StringIO(whole.replace("Question 1 of ñ 7?", '"Question 1'), newline=""))


@pytest.mark.parametrize("row, message", [(("p", "x", "0", "a"), "line 3: proposition_id 'x'"),
                                          (("p", 1, "1; 2", "a"), "line 3: dependency '1; 2'"),
                                          (("p", 1, "", "a"), "line 3: dependency ''")])  # fmt: skip
def test_a_number_that_is_none_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        dpg.load_questions(table([ROWS[0], row]))


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dpg_bench\.csv of github"):
        dpg.load_questions(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="no column dependency"):
        dpg.load_questions(io.StringIO("item_id,proposition_id,tuple,question_natural_language\n"))
    with pytest.raises(ValueError, match="empty"):
        dpg.load_questions(io.StringIO(""))
    with pytest.raises(ValueError, match="'official' or 'fixed'"):
        dpg.load_questions(table(ROWS), "best")


def brute_force(answers, dependency, images):
    """The rule, written from its definition."""
    per_image = []
    for i in range(images):
        value = {qid: answers[qid][i] == "yes" for qid in answers}
        for qid in dependency:
            value[qid] = value[qid] and all(value[p] for p in dependency[qid] if p)
        per_image.append(sum(value.values()) / len(value))
    return per_image


def test_scores_equal_the_definition_on_random_graphs():
    rng = random.Random(0)
    for _ in range(300):
        n, images = rng.randint(1, 7), rng.randint(1, 4)
        dependency = {q: rng.sample(range(n + 1), rng.randint(1, min(3, n))) for q in rng.sample(range(1, n + 1), n)}
        answers = {q: rng.choices(["yes", "no", "Yes", "yes."], [6, 2, 1, 1], k=images) for q in dependency}
        result = dpg.score_sample(answers, dependency)
        assert result["per_image"] == brute_force(answers, dependency, images)
        assert result["score"] == pytest.approx(np.mean(result["per_image"]))
        assert result["raw"] == {q: float(texts[-1] == "yes") for q, texts in answers.items()}


def test_zeroes_cascade_down_but_not_from_a_parent_still_to_come():
    answers = {1: ["yes"], 2: ["yes"], 3: ["no"]}
    assert dpg.score_sample({1: ["no"], 2: ["yes"], 3: ["yes"]}, {1: [0], 2: [1], 3: [2]})["score"] == 0
    assert dpg.score_sample(answers, {1: [2], 2: [3], 3: [0]})["score"] == pytest.approx(1 / 3)


def test_only_the_first_images_count_where_asked():
    answers = {1: ["yes", "no", "no"]}
    assert dpg.score_sample(answers, {1: [0]}, 1)["score"] == 1
    assert dpg.score_sample(answers, {1: [0]})["per_image"] == [1, 0, 0]


@pytest.mark.parametrize("answers, dependency, images, message", [
    ({}, {}, None, "no answers"),
    ({1: []}, {1: [0]}, None, "at least one"),
    ({1: ["yes"], 2: ["yes", "no"]}, {1: [0], 2: [0]}, None, r"\[1\] have fewer than 2"),
    ({1: ["yes"]}, {1: [0]}, 2, "fewer than 2"),
    ({1: ["yes"]}, {1: [0], 2: [1]}, None, r"\[2\]"),
    ({1: [None]}, {1: [0]}, None, "must be text"),
    ({1: ["yes"]}, {1: [9]}, None, "depends on question 9"),
])  # fmt: skip
def test_answers_that_do_not_fit_are_refused(answers, dependency, images, message):
    with pytest.raises(ValueError, match=message):
        dpg.score_sample(answers, dependency, images)


def test_an_unknown_parent_matters_only_when_it_is_looked_up():
    assert dpg.score_sample({1: ["no"], 2: ["yes"]}, {1: [0], 2: [1, 9]})["score"] == 0


def test_the_category_of_a_question_is_the_head_of_its_tuple():
    questions = dpg.load_questions(table(ROWS), "fixed")
    summary = dpg.summarise(yes(questions, no=[("5", 1, 0)]), questions, "fixed", 1)
    assert summary["l1"] == pytest.approx({"attribute": 50, "entity": 50, "global": 100, "relation": 0})
    assert summary["l2"]["attribute - color"] == 100 and summary["l2"]["attribute - size"] == 0
    assert summary["categories"] == {**summary["l2"], **summary["l1"]}
    assert summary["score"] == pytest.approx(100 * (1 + 0 + 1) / 3)


def test_official_categories_read_the_last_image_alone_and_no_parents():
    questions = dpg.load_questions(table(ROWS))
    del questions["first"]
    no_in_the_first = dpg.summarise(yes(questions, 2, [("5", 1, 0)]), questions, images=2)
    assert no_in_the_first["l1"] == {"attribute": 100, "entity": 100, "global": 100, "relation": 100}
    assert no_in_the_first["score"] == pytest.approx(100 * (0.5 + 1) / 2)
    no_in_the_last = dpg.summarise(yes(questions, 2, [("5", 1, 1)]), questions, images=2)
    assert no_in_the_last["l1"] == {"attribute": 100, "entity": 0, "global": 100, "relation": 100}
    fixed = dpg.summarise(yes(questions, 2, [("5", 1, 0)]), questions, "fixed", 2)
    assert fixed["l1"] == {"attribute": 50, "entity": 50, "global": 100, "relation": 50}


def test_officially_the_first_prompt_fails_for_the_question_it_lost():
    questions = dpg.load_questions(table(ROWS))
    answers = yes(dpg.load_questions(table(ROWS), "fixed"))
    summary = dpg.summarise(answers, questions, images=1)
    assert summary["failed"] == ["first"] and "depends on question 1" in summary["errors"]["first"]
    assert summary["scored"] == 2 and summary["score"] == 100
    mended = dpg.summarise(answers, dpg.load_questions(table(ROWS), "fixed"), "fixed", 1)
    assert mended["failed"] == [] and mended["scored"] == 3


def test_missing_and_extra_prompts_are_dropped_officially_and_counted_when_fixed():
    questions = dpg.load_questions(table(ROWS), "fixed")
    answers = yes(questions)
    del answers["first"]
    answers["stray"] = {1: ["yes"]}
    official = dpg.summarise(answers, questions, images=1)
    assert official["score"] == 100 and official["failed"] == ["stray"] and official["missing"] == ["first"]
    fixed = dpg.summarise(answers, questions, "fixed", 1)
    assert fixed["score"] == pytest.approx(100 * 2 / 3) and fixed["failed"] == ["first", "stray"]
    assert fixed["l2"]["attribute - color"] == 0 and fixed["scored"] == 2


def test_too_few_images_of_a_prompt_fail_it():
    questions = dpg.load_questions(table(ROWS), "fixed")
    answers = yes(questions, 4)
    answers["5"] = {qid: texts[:3] for qid, texts in answers["5"].items()}
    assert dpg.summarise(answers, questions)["failed"] == ["5"]
    with pytest.raises(ValueError, match="no prompt could be scored"):
        dpg.summarise({"5": answers["5"]}, questions)
    with pytest.raises(ValueError, match="no prompt could be scored"):
        dpg.summarise({}, questions, "fixed")


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_the_order_of_answers_moves_nothing(mode):
    rng = random.Random(2)
    rows = [(f"p{i}", q, "0" if q == 1 else str(rng.randint(1, q - 1)), f"c{rng.randint(0, 3)} - d{rng.randint(0, 2)} (x)")
            for i in range(40) for q in range(1, rng.randint(2, 6))]  # fmt: skip
    questions = dpg.load_questions(table(rows), mode)
    answers = {i: {q: rng.choices(["yes", "no"], k=4) for q in g["qid2question"]} for i, g in questions.items()}
    shuffled = {
        i: dict(rng.sample(list(answers[i].items()), len(answers[i]))) for i in rng.sample(list(answers), len(answers))
    }
    assert dpg.summarise(shuffled, questions, mode) == dpg.summarise(answers, questions, mode)


def test_a_grid_is_cut_row_by_row():
    pixels = np.zeros((8, 8, 3), np.uint8)
    for i, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels[y : y + 4, x : x + 4] = 10 * (i + 1)
    image = Image.fromarray(pixels)
    assert [t.getpixel((0, 0))[0] for t in dpg.split_grid(image, 4)] == [10, 20, 30, 40]
    assert [t.size for t in dpg.split_grid(image, images=3)] == [(4, 4)] * 3
    assert dpg.split_grid(image, images=1)[0].size == (8, 8)
    assert dpg.grid_boxes(4, 2) == [(0, 0, 4, 4), (4, 0, 8, 4)]


def test_a_picture_that_is_no_grid_is_black_outside_officially_and_refused_when_fixed():
    image = Image.new("RGB", (6, 6), "white")
    assert dpg.split_grid(image, 4)[3].getpixel((3, 3)) == (0, 0, 0)
    with pytest.raises(ValueError, match="6 x 6 px is not a grid of 4 images of 4 px; it must be 8 x 8"):
        dpg.split_grid(image, 4, mode="fixed")
    assert dpg.split_grid(image, 6, 1, "fixed")[0].size == (6, 6)
    with pytest.raises(ValueError, match="at least 1"):
        dpg.grid_boxes(0)


def test_result_files_come_back(tmp_path):
    sample = dpg.score_sample({1: ["yes", "no", "yes"]}, {1: [0]})
    questions = dpg.load_questions(table(ROWS), "fixed")
    summary = dpg.summarise(yes(questions), questions, "fixed", 1)
    line = dpg.result_line("a, 5/ñ 7.png", sample["per_image"], sample["score"])
    assert line == "a, 5/ñ 7.png, 1.0, 0.0, 1.0, 0.6666666666666666\n"
    path = tmp_path / "results.txt"
    path.write_text(line + dpg.summary_text(summary, "m", "a", "b"), encoding="utf-8")
    assert dpg.read_results(path) == {"ñ 7": {"score": sample["score"], "per_image": [1, 0, 1]}}
    assert path.read_text(encoding="utf-8").endswith("Save results to: b\nDPG-Bench score: 100.0\n")
    assert dpg.detail_line("x.png", (0, 0, 8, 8), "Is it?", "yes") == "x.png, (0, 0, 8, 8), Is it?, yes"
    path.write_text("a, 1.0\n")
    with pytest.raises(ValueError, match="line 1"):
        dpg.read_results(path)


def details(tmp_path, lines):
    path = tmp_path / "results_detail.txt"
    path.write_text("".join(line + "\n" for line in lines))
    return path


BOXES = dpg.grid_boxes(8, 2)


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_answers_come_back_from_a_details_file_and_give_the_same_summary(tmp_path, mode):
    questions = dpg.load_questions(table(ROWS), mode)
    answers = yes(questions, images=2, no={("5", 1, 1), ("ñ 7", 1, 0)})
    answers["5"][2][0] = "yes, two, (1, 2, 3, 4), no"
    lines = [
        dpg.detail_line(f"/pictures, all/{item}.png", box, text, answers[item][qid][image])
        for item, group in questions.items()
        for image, box in enumerate(BOXES)
        for qid, text in group["qid2question"].items()
    ]
    read = dpg.read_details(details(tmp_path, lines), questions)
    assert read == answers
    assert dpg.summarise(read, questions, mode, 2) == dpg.summarise(answers, questions, mode, 2)
    appended = [*(line[: line.rindex(", ")] + ", maybe" for line in lines), *lines]  # the official code appends
    assert dpg.read_details(details(tmp_path, appended), questions) == answers


def test_answers_of_several_lines_and_questions_that_begin_alike_or_are_equal_are_told_apart(tmp_path):
    texts = {1: "Is it red", 2: "Is it red, and big", 3: "Is it red"}
    questions = {"a": {"qid2tuple": texts, "qid2dependency": {qid: [0] for qid in texts}, "qid2question": texts}}
    said = {1: "yes\nor no", 2: "yes", 3: "no"}
    lines = [dpg.detail_line("a.png", BOXES[0], texts[qid], answer) for qid, answer in said.items()]
    assert dpg.read_details(details(tmp_path, lines), questions) == {"a": {qid: [text] for qid, text in said.items()}}


@pytest.mark.parametrize(("lines", "message"), [
    (["nothing"], "line 1: 'nothing' is not an answer"),
    (["b.png, (0, 0, 8, 8), Is it?, yes"], "line 1: 'b' is not a prompt"),
    (["a.png, (0, 0, 8, 8), Is it?, yes", "a.png, (0, 0, 8, 8), Was it?, yes"], "line 2: .* not begin with a question of"),
    (["a.png, (0, 0, 8, 8), Is it?, yes"], r"'a' has no answer to question 2 about \(0, 0, 8, 8\)"),
])  # fmt: skip
def test_a_details_file_that_does_not_fit_is_refused_with_its_line(tmp_path, lines, message):
    texts = {1: "Is it?", 2: "Is it big?"}
    questions = {"a": {"qid2tuple": texts, "qid2dependency": {1: [0], 2: [0]}, "qid2question": texts}}
    with pytest.raises(ValueError, match=message):
        dpg.read_details(details(tmp_path, lines), questions)
    with pytest.raises(ValueError, match="not a details file"):
        dpg.read_details(tmp_path / "absent", questions)


def test_a_long_answer_is_cut_in_the_message():
    with pytest.raises(ValueError, match="to question 1 must be text") as caught:
        dpg.score_sample({1: [[0.5] * 1280]}, {1: [0]})
    assert len(str(caught.value)) < 120
