"""The registry's benchmarks: ids, questions, scores, and summaries of both modes."""

import csv
import json
import subprocess
import sys

import numpy as np
import official_data
import pytest

from eval.benchmarks.base import Judged, Question
from eval.benchmarks.registry import BENCHMARKS, load
from eval.benchmarks.shapes.prompts import make_prompts


def answer_all(benchmark, prompt, reply):
    """Answers to every question of one image, as a judge loop gets them."""
    answers = {}
    for _ in range(3):
        questions = [q for q in benchmark.questions(prompt, answers) if not q.together]
        if not questions:
            return answers
        for question in questions:
            assert question.judge in benchmark.judges and question.key not in answers
            answers[question.key] = reply(question)
    raise AssertionError("questions never end")


def test_every_registered_benchmark_loads_and_says_what_it_is():
    for name in BENCHMARKS:
        benchmark = load(name)
        assert benchmark.name == name and benchmark.version and benchmark.scale in (1, 100)
        assert benchmark.judges and benchmark.images_per_prompt >= 1
        assert (benchmark.prompt_count > 0) == (name != "captions")  # as many as the corpus has
    assert load("shapes").prompt_count == len(load("shapes").prompts())


@pytest.mark.parametrize("name, message", [("genevall", "did you mean 'geneval'"), ("DPG", "did you mean 'dpg'"),
                                           ("zzz", "one of shapes, captions, geneval"), ("nowhere.at:all", "cannot be imported")])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_benchmark_of_your_own_is_named_by_its_module():
    assert load("eval.benchmarks.geneval:BENCHMARK") is load("geneval")


def test_scoring_imports_neither_torch_nor_pandas():
    code = (
        "import sys\nfrom eval.benchmarks.registry import BENCHMARKS, load\n[load(name) for name in BENCHMARKS]\n"
        "import eval.geneval, eval.geneval2, eval.dpg, eval.oneig\n"
        "sys.exit(', '.join({'torch', 'pandas', 'transformers', 'diffusers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if n not in ("shapes", "captions")])
def test_prompt_data_that_is_not_there_is_named_with_its_source(name, tmp_path):
    benchmark = load(name)
    with pytest.raises(ValueError, match="needs the path of its prompt data: .*github.com"):
        benchmark.prompts()
    with pytest.raises(ValueError, match="absent does not exist; .*github.com"):
        benchmark.prompts(tmp_path / "absent")


def test_a_question_digest_is_what_the_judge_is_asked():
    question = Question("vqa", "1", "Is it?", {"a": 1, "b": 2})
    assert question.digest == Question("vqa", "2", "Is it?", {"b": 2, "a": 1}).digest  # another key
    others = [Question("ocr", "1", "Is it?", {"a": 1, "b": 2}), Question("vqa", "1", "is it?", {"a": 1, "b": 2}),
              Question("vqa", "1", "Is it?", {"a": 1})]  # fmt: skip
    assert len({question.digest, *(q.digest for q in others)}) == 4


# ---- GenEval and shapes

GENEVAL = [
    {"tag": "colors", "include": [{"class": "car", "count": 2, "color": "red"}], "prompt": "two red cars"},
    {"tag": "counting", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
]


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in GENEVAL))
    return load("geneval").prompts(path)


def detections(*scores):
    return [{"box": [20 * i, 0, 20 * i + 9, 9], "score": s} for i, s in enumerate(scores)]


def test_the_color_judge_is_asked_about_the_objects_that_the_rule_looks_at(geneval):
    benchmark = load("geneval")
    assert [p["id"] for p in geneval] == ["00000", "00001"]
    assert [q.judge for q in benchmark.questions(geneval[0], {})] == ["detector"]
    answers = {"objects": {"car": detections(0.5, 0.2, 0.9, 0.8)}}
    (question,) = benchmark.questions(geneval[0], answers)
    assert question.judge == "color" and question.key == "color/car"
    assert question.options == {"class": "car", "boxes": [[40, 0, 49, 9], [60, 0, 69, 9]], "indices": [2, 3]}
    scored = benchmark.score(geneval[0], Judged([{**answers, "color/car": ["red", "blue"]}]))
    assert scored.images == (0.0,) and scored.reasons == ("expected red car>=2, found 1 red; and 1 red, 1 blue",)
    assert benchmark.score(geneval[0], Judged([{**answers, "color/car": ["red", "red"]}])).score == 1


def test_no_color_is_asked_where_too_few_objects_are_found(geneval):
    answers = {"objects": {"car": detections(0.5)}}
    assert load("geneval").questions(geneval[0], answers) == []
    assert load("geneval").score(geneval[0], Judged([answers])).reasons == ("expected car>=2, found 1",)
    assert load("geneval").questions(geneval[1], {"objects": {}}) == []


def test_an_unknown_class_or_color_is_refused(geneval, tmp_path):
    with pytest.raises(ValueError, match="unknown class 'automobile'; it must be one of person, bicycle"):
        load("geneval").score(geneval[0], Judged([{"objects": {"automobile": detections(0.9)}}]))
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**GENEVAL[0], "include": [{"class": "car", "count": 1, "color": "teal"}]}))
    with pytest.raises(ValueError, match="prompt 1: unknown color 'teal'; it must be one of red"):
        load("geneval").prompts(path)


def test_an_unjudged_image_shrinks_the_denominator_officially_and_is_wrong_when_fixed(geneval):
    right = {"objects": {"dog": detections(0.95)}}
    red = {"objects": {"car": detections(0.9, 0.8)}, "color/car": ["red", "red"]}
    judged = {"00000": Judged([red, None]), "00001": Judged([right, right])}
    official, fixed = (load("geneval").summarise(geneval, judged, mode) for mode in ("official", "fixed"))
    assert official["score"] == 1 and fixed["score"] == 0.75
    assert [official[k] for k in ("expected", "scored", "failed")] == [4, 3, 1]
    del judged["00000"]
    assert load("geneval").summarise(geneval, judged, "official")["score"] == 1
    assert load("geneval").summarise(geneval, judged, "fixed")["categories"] == {"counting": 1.0, "colors": 0.0}
    with pytest.raises(ValueError, match="unknown prompts, such as '00009'"):
        load("geneval").summarise(geneval, {"00009": Judged([right])}, "fixed")
    with pytest.raises(ValueError, match="none of 2 images"):
        load("geneval").summarise(geneval, {}, "fixed")


def test_shapes_has_the_prompts_of_old_and_scores_its_splits_apart():
    benchmark = load("shapes")
    prompts = benchmark.prompts()
    assert [{k: v for k, v in p.items() if k != "id"} for p in prompts] == make_prompts()
    empty = {p["id"]: Judged([{"objects": {}}] * p["images"]) for p in prompts}
    first = prompts[0]
    shape = first["include"][0]["class"]
    result = {"objects": {shape: [{"box": [0, 0, 9, 9], "score": 1.0, "color": "red"}]}}
    summary = benchmark.summarise(prompts, {**empty, first["id"]: Judged([result] * first["images"])}, "fixed")
    assert summary["categories"]["single_object"] == pytest.approx(first["images"] / 48)
    assert summary["held_out"]["score"] == 0 and summary["failed"] == 0
    assert summary["expected"] + summary["held_out"]["expected"] == sum(p["images"] for p in prompts)


# ---- DPG-Bench


@pytest.fixture
def dpg(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    columns = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
               "tuple", "question_natural_language"]  # fmt: skip
    rows = [("a", 1, "0"), ("a", 2, "1"), ("7", 1, "0"), ("7", 2, "1"), ("ü", 1, "0")]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [columns] + [[i, f"text {i}", "", q, d, "", "", "entity - whole (x)", f"Q{q}?"] for i, q, d in rows]
        )
    return load("dpg").prompts(path)


def test_dpg_prompts_pass_through_json_with_their_official_questions(dpg):
    assert [p["id"] for p in dpg] == ["a", "7", "ü"] and dpg[0]["prompt"] == "text a"
    assert [q[0] for q in dpg[0]["questions"]] == [1, 2] and [q[0] for q in dpg[0]["official_questions"]] == [2]
    assert "official_questions" not in dpg[1]
    assert json.loads(json.dumps(dpg)) == dpg
    assert load("dpg").picture_path(dpg[2], 3, "m") == "ü.png"


def test_dpg_scores_both_ways_from_the_same_answers(dpg):
    benchmark = load("dpg")
    judged = {p["id"]: Judged([answer_all(benchmark, p, lambda q: "yes")] * 4) for p in dpg}
    judged["7"] = Judged([{"1": "no", "2": "yes"}] + [{"1": "yes", "2": "yes"}] * 3)
    official, fixed = (benchmark.summarise(dpg, judged, mode) for mode in ("official", "fixed"))
    assert official["score"] == pytest.approx(87.5) and official["failed_items"] == ["a"]
    assert fixed["score"] == pytest.approx(100 * (1 + 0.75 + 1) / 3) and fixed["failed"] == 0
    scored = benchmark.score(dpg[1], judged["7"])
    assert scored.images == (0.0, 1.0, 1.0, 1.0) and scored.score == 0.75 and scored.reasons[0] == "Q1?"
    judged["7"] = Judged([None, *judged["7"].images[1:]])
    assert benchmark.summarise(dpg, judged, "official")["score"] == 100
    assert benchmark.summarise(dpg, judged, "fixed")["score"] == pytest.approx(200 / 3)
    assert benchmark.score(dpg[1], judged["7"]).images == (None, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="'7'.*no answers to questions"):
        benchmark.score(dpg[1], Judged([{"1": "yes"}]))


# ---- GenEval 2


def test_geneval2_asks_in_one_word_and_averages_over_images(tmp_path):
    benchmark = load("geneval2")
    row = {"prompt": "two dogs", "atom_count": 3, "vqa_list": [["How many dogs?", "two"], ["Are there dogs?", "Yes"]],
           "skills": ["count", "object"]}  # fmt: skip
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (prompt,) = benchmark.prompts(path)
    first, second = benchmark.questions(prompt, {})
    assert first.text == "How many dogs? Answer in one word." and "2" in first.options["answers"]
    assert second.options["answers"] == ["Yes", "yes", " yes", " Yes"]
    judged = {prompt["id"]: Judged([{"0": 0.25, "1": 1.0}, None])}
    scored = benchmark.score(prompt, judged[prompt["id"]])
    assert scored.score == 0.5 and scored.subscores == {"gm": 0.5, "am": 0.625}
    assert scored.reasons == ("How many dogs? 0.25", "not judged")
    official, fixed = (benchmark.summarise([prompt], judged, mode) for mode in ("official", "fixed"))
    assert official["score"] == 50 and fixed["score"] == 25 and official["failed"] == 1
    assert official["categories"] == {"count": 25, "object": 100, "3 atoms": 50}


# ---- OneIG-Bench


@pytest.fixture
def checkout(tmp_path):
    """The files of the official repository that the benchmark reads, with a few prompts."""

    return official_data.write_oneig(tmp_path)


def replies(question):
    return {"vqa": "Yes", "ocr": "Open", "style": 0.5, "reasoning": 0.25}[question.judge]


def test_oneig_asks_each_class_what_its_dimensions_need(checkout):
    benchmark = load("oneig")
    prompts = benchmark.prompts(checkout)
    asked = {p["id"]: [q.judge for q in benchmark.questions(p, {})] for p in prompts}
    assert asked == {
        "anime_000": ["diversity", "vqa", "vqa"],
        "anime_001": ["diversity", "vqa", "vqa", "style"],
        "text_000": ["diversity", "ocr"],
        "text_001": ["diversity", "ocr"],
        "reasoning_000": ["diversity", "reasoning"],
    }
    vqa = benchmark.questions(prompts[0], {})[1]
    assert vqa.text == "Is it a cat?. Please answer 'Yes' or 'No' only."
    assert benchmark.picture_path(prompts[1], 2, "m") == "anime/m/001.webp"


def test_oneig_scores_five_dimensions(checkout):
    benchmark = load("oneig")
    prompts = benchmark.prompts(checkout)
    judged = {p["id"]: Judged([answer_all(benchmark, p, replies)] * 2, {"diversity": [0.3]}) for p in prompts}
    summary = benchmark.summarise(prompts, judged, "official")
    assert summary["categories"]["alignment"] == 1 and summary["categories"]["style"] == 0.5
    assert summary["categories"]["reasoning"] == 0.25 and summary["categories"]["diversity"] == pytest.approx(0.3)
    assert summary["dimensions"]["text"]["ED"] == 2 and summary["dimensions"]["text"]["CR"] == 0.5
    assert summary["score"] == pytest.approx(np.mean(list(summary["categories"].values())))
    assert summary["missing_dimensions"] == [] and summary["expected"] == 10
    scored = benchmark.score(prompts[1], judged["anime_001"])
    assert scored.subscores == {"alignment": 1, "style": 0.5, "diversity": 0.3}
    assert benchmark.score(prompts[3], judged["text_001"]).reasons == ("read 'Open'",) * 2


def test_oneig_repeats_the_text_before_a_black_picture_officially_only(checkout):
    benchmark = load("oneig")
    prompts = [p for p in benchmark.prompts(checkout) if p["tag"] == "text"]
    judged = {"text_000": Judged([{"ocr": "Open"}]), "text_001": Judged([None])}
    official, fixed = (benchmark.summarise(prompts, judged, mode) for mode in ("official", "fixed"))
    assert fixed["score"] == 1 and official["score"] < 1
    assert fixed["failed"] == 1 and fixed["missing_dimensions"] == ["alignment", "reasoning", "style", "diversity"]
    del judged["text_001"]  # no picture at all
    assert benchmark.summarise(prompts, judged, "official")["score"] == 1


def test_oneigs_text_alone_needs_no_other_judge(checkout):
    benchmark = load("oneig-text")
    prompts = benchmark.prompts(checkout)
    assert [p["id"] for p in prompts] == ["text_000", "text_001"] and set(benchmark.judges) == {"ocr"}
    judged = {p["id"]: Judged([{"ocr": text}] * 2) for p, text in zip(prompts, ("Open", "Shut"))}
    assert [q.judge for q in benchmark.questions(prompts[0], {})] == ["ocr"]
    summary = benchmark.summarise(prompts, judged, "fixed")
    assert summary["score"] == summary["categories"]["text"] == 1
    assert benchmark.score(prompts[0], judged["text_000"]).subscores == {"text": 1}


def test_a_score_of_zero_is_a_score(checkout):
    benchmark = load("oneig")
    prompts = [p for p in benchmark.prompts(checkout) if p["tag"] == "reasoning"]
    summary = benchmark.summarise(prompts, {"reasoning_000": Judged([{"reasoning": 0.0}])}, "fixed")
    assert summary["categories"] == {"reasoning": 0.0}


@pytest.mark.parametrize("name", ["OneIG-Bench.csv", "scripts/style/style.csv", "scripts/text/text_content.csv"])
def test_a_broken_file_of_the_checkout_is_named(checkout, name):
    whole = (checkout / name).read_text()
    (checkout / name).write_text(whole.rstrip().rpartition(",")[0] + "\n")
    with pytest.raises(ValueError, match=f"{name}, line .*cut short"):
        load("oneig").prompts(checkout)
    (checkout / name).write_text("id\n1\n")
    with pytest.raises(ValueError, match=f"{name} has no column"):
        load("oneig").prompts(checkout)
    (checkout / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is not a file"):
        load("oneig").prompts(checkout)


def test_a_prompt_without_its_entry_is_named(checkout):
    (checkout / "scripts/reasoning/gt_answer.json").write_text("{}")
    with pytest.raises(ValueError, match="no entry '000' for prompt 'reasoning_000'"):
        load("oneig").prompts(checkout)
    (checkout / "scripts/reasoning/gt_answer.json").write_text("{")
    with pytest.raises(ValueError, match=r"gt_answer\.json is not JSON"):
        load("oneig").prompts(checkout)


def test_the_chinese_benchmark_reads_its_own_files(checkout):
    with pytest.raises(ValueError, match=r"text_content_zh\.csv is not a file"):
        load("oneig-zh").prompts(checkout)
    assert load("oneig-zh").tasks == (*load("oneig").tasks, "multilingualism")
