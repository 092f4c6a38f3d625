"""GenEval 2's rule: expected replies, both means, and the official analysis."""

import json
import random

import pytest
from scipy.stats import gmean

from eval import geneval2


def test_a_number_is_expected_as_word_and_numeral():
    expected = ["four", "Four", " four", " Four", "4", " 4"]
    assert geneval2.expected_answers("How many bicycles are in the image?", "four") == expected
    assert geneval2.expected_answers("How many dogs?", "ten")[4:] == ["10", " 10"]
    assert geneval2.expected_answers("How many dogs?", "eleven")[4:] == ["other", " other"]


@pytest.mark.parametrize("answer", ["Yes", "No", "red"])
def test_every_other_question_expects_yes(answer):
    assert geneval2.expected_answers("how many? Are there dogs?", answer) == ["Yes", "yes", " yes", " Yes"]


def test_means_equal_scipys():
    rng = random.Random(0)
    for _ in range(100):
        scores = [rng.random() for _ in range(rng.randint(1, 12))]
        result = geneval2.soft_tifa(scores)
        assert result["gm"] == pytest.approx(gmean(scores), abs=1e-12)
        assert result["am"] == pytest.approx(sum(scores) / len(scores)) and result["gm"] <= result["am"] + 1e-12


def test_one_impossible_answer_makes_the_geometric_mean_zero():
    assert geneval2.soft_tifa([1.0, 0.0, 1.0]) == {"am": pytest.approx(2 / 3), "gm": 0.0}


@pytest.mark.parametrize("scores", [[], [-0.1], [float("nan")], [float("inf")]])
def test_what_is_no_probability_is_refused(scores):
    with pytest.raises(ValueError, match="no scores|must be a probability"):
        geneval2.soft_tifa(scores)


DATA = [
    {"prompt": "a", "atom_count": 3, "skills": ["object", "count", "count"], "vqa_list": [["q", "Yes"]] * 3},
    {"prompt": "b", "atom_count": 10, "skills": ["object", "verb"], "vqa_list": [["q", "Yes"]] * 2},
    {"prompt": "c", "atom_count": 3, "skills": ["position"], "vqa_list": [["q", "Yes"]]},
]
SCORES = [[0.5, 1.0, 0.25], [0.5, 0.5], [0.1]]


def test_a_summary_is_in_percent_by_skill_and_number_of_atoms():
    summary = geneval2.summarise(SCORES, DATA)
    assert summary["am"] == pytest.approx(100 * (1.75 / 3 + 0.5 + 0.1) / 3)
    assert summary["gm"] == pytest.approx(100 * (0.5 + 0.5 + 0.1) / 3)
    assert summary["skills"] == pytest.approx({"object": 50, "count": 62.5, "position": 10, "verb": 50})
    assert summary["atomicity"] == pytest.approx({3: 100 * (0.5 + 0.1) / 2, 10: 50})


def test_prompts_may_come_in_any_order():
    order = [2, 0, 1]
    shuffled = geneval2.summarise([SCORES[i] for i in order], [DATA[i] for i in order])
    assert shuffled == geneval2.summarise(SCORES, DATA)


@pytest.mark.parametrize("scores, change, message", [
    (SCORES[:2], {}, "2 lists of scores and 3 prompts"),
    ([[0.5], *SCORES[1:]], {}, "prompt 0 has 1 scores for 3 questions"),
    (SCORES, {"skills": ["object", "size", "count"]}, "'size'; it must be one of object"),
    (SCORES, {"atom_count": 11}, "atom_count=11"),
    ([[0.5, 2, -1], *SCORES[1:]], {}, "prompt 0: score -1"),
])  # fmt: skip
def test_scores_that_do_not_fit_the_data_are_refused(scores, change, message):
    with pytest.raises(ValueError, match=message):
        geneval2.summarise(scores, [{**DATA[0], **change}, *DATA[1:]])


def test_files_are_the_official_ones(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    assert geneval2.load_prompts(path) == DATA
    assert json.loads(geneval2.scores_text(SCORES)) == SCORES
    lists = tmp_path / "score_lists.json"
    lists.write_text(geneval2.scores_text(SCORES))
    assert geneval2.read_scores(lists) == SCORES
    for content, message in (("[[0.5], [0.5, 1]", "is not JSON"), ("{}", "a list with a list"),
                             ("[[0.5], [-1]]", r"prompt 1: \[-1\]"), ("[[true]]", "prompt 0"), ("[0.5]", "prompt 0: 0.5")):  # fmt: skip
        lists.write_text(content)
        with pytest.raises(ValueError, match=message):
            geneval2.read_scores(lists)
    with pytest.raises(ValueError, match="not a file of scores"):
        geneval2.read_scores(tmp_path / "absent.json")
    for change, message in (
        ({"skills": []}, r"3 questions for the skills \[\]"),
        ({"skills": ["object", "magic", "count"]}, "unknown skill 'magic'; it must be one of object"),
        ({"atom_count": 12}, "atom_count=12; it must be 3 to 10"),
        ({"vqa_list": ["Is it?"] * 3}, r"'vqa_list' must be a list of \[question, answer\]"),
        ({"vqa_list": [["Is it?", "yes", "no"]] * 3}, "'vqa_list' must be"),
        ({"vqa_list": None}, "'vqa_list' must be"),
    ):
        path.write_text(json.dumps(DATA[0]) + "\n" + json.dumps({**DATA[0], **change}) + "\n")
        with pytest.raises(ValueError, match=f"line 2: {message}"):
            geneval2.load_prompts(path)
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 1.*'vqa_list'"):
        geneval2.load_prompts(path)
