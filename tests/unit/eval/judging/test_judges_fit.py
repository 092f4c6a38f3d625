"""A judge is accepted only for questions that it can answer in the words that the benchmark counts; an answer of a wrong
type is refused before it is kept."""

from __future__ import annotations

import json

import numpy as np
import official_data
import pytest
from PIL import Image

from eval import catalog, cli
from eval.benchmarks import registry
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judges.registry import JUDGES
from eval.judging.answers import Answers
from eval.scorecard import judge_run, rescore
from tasks.evaluation.plan import plan_benchmarks


def quiet(_):
    pass


def noise(prompts, seeds, height, width):
    rng = np.random.default_rng(seeds[0])
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in prompts]


class Says:
    """A judge that gives every question the same answer."""

    model, spec, revision = "says", {}, "f" * 64

    def __init__(self, answer, name="says"):
        self.reply, self.name = answer, name

    def answer(self, requests):
        return [self.reply] * len(requests)

    def selftest(self):
        pass


WRITERS = {
    "geneval": official_data.write_geneval,
    "geneval2": official_data.write_geneval2,
    "dpg": official_data.write_dpg,
    "oneig": official_data.write_oneig,
    "oneig-text": official_data.write_oneig,
}


def run_of(benchmark, folder, images=2):
    config = EvalConfig(
        benchmark=benchmark,
        prompts_file=str(WRITERS[benchmark](folder)),
        seeds=(0,),
        images_per_prompt=images,
        image_size_px=8,
    )
    generate(noise, catalog.prompts(config), config, folder / "run", log=quiet)
    return folder / "run"


@pytest.mark.parametrize(
    ("benchmark", "skill", "judge"),
    [
        ("dpg", "vqa", "pp-ocr"),
        ("dpg", "vqa", "qwen2.5-vl-7b"),
        ("oneig", "vqa", "blip-vqa"),
        ("oneig", "vqa", "mplug@./weights"),
        ("oneig", "reasoning", "pp-ocr"),
        ("geneval", "detector", "pp-ocr"),
        ("geneval2", "soft_tifa", "pp-ocr"),
        ("captions", "features", "pp-ocr"),
        ("geneval", "detector", "shapes-detector"),
        ("shapes", "detector", "ssd-mobilenet-v2"),
    ],
)
def test_a_registered_judge_that_cannot_answer_a_skill_is_refused_with_those_that_can(benchmark, skill, judge):
    others = {name: "module:function" for name in catalog.benchmark(benchmark).judges if name != skill}
    with pytest.raises(ValueError, match=f"judge '{judge}' answers as ") as caught:
        catalog.judges_of(EvalConfig(benchmark=benchmark, judges={**others, skill: judge}))
    valid = str(caught.value).rpartition(" must be one of ")[2].split(", ")
    assert valid[-1] == "or module:function" and len(valid) > 1
    for name in valid[:-1]:
        assert catalog.judges_of(EvalConfig(benchmark=benchmark, judges={**others, skill: name}))[skill] == name
    assert judge.partition("@")[0] not in valid


def test_the_judges_that_a_benchmark_recommends_fit_it():
    for name in registry.BENCHMARKS:
        benchmark = registry.load(name)
        for chosen in (benchmark.default_judges, benchmark.recommended_judges, benchmark.packaged_judges):
            for skill, judge in chosen.items():
                catalog.check_fits(benchmark, skill, judge)
        assert all(catalog.fitting(benchmark, skill) for skill in benchmark.judges)


@pytest.mark.parametrize("benchmark", ["dpg", "oneig", "geneval", "geneval2"])
def test_the_command_refuses_a_judge_that_does_not_fit_in_one_line(benchmark, tmp_path, capsys):
    run = run_of(benchmark, tmp_path)
    named = {"dpg": ["pp-ocr", "vqa=pp-ocr", "qwen2.5-vl-7b"], "oneig": ["reasoning=pp-ocr", "vqa=blip-vqa"]}
    for judge in named.get(benchmark, ["pp-ocr"]):
        assert cli.main(["judge", str(run), "--judge", judge]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: judge '") and error.count("\n") == 1 and "must be one of" in error
    assert not (run / "judged").exists()


def test_a_bare_name_takes_the_skills_that_it_answers_in_the_command_as_in_the_planner():
    for benchmark, judge, skills in (
        ("oneig", "qwen2.5-vl-7b", {"vqa", "ocr"}),
        ("oneig", "efficientnet-lite0", {"diversity"}),
        ("oneig", "pp-ocr", {"ocr"}),
        ("geneval", "ssd-mobilenet-v2", {"detector", "color"}),
        ("geneval", "own.module:judge", {"detector", "color"}),
    ):
        assert catalog.named_judges([judge], [benchmark]) == {benchmark: dict.fromkeys(skills, judge)}
    (oneig,) = plan_benchmarks("oneig", {}, judges="efficientnet-lite0")
    assert oneig.judges == {"vqa": "qwen2.5-vl-7b", "ocr": "qwen2.5-vl-7b", "diversity": "efficientnet-lite0"}


def test_names_of_files_may_have_an_equals_sign():
    assert catalog.named_judges(["mplug@./a=b"], ["dpg"]) == {"dpg": {"vqa": "mplug@./a=b"}}
    assert catalog.named_judges(["dpg.vqa=mplug@./a=b"], ["dpg"]) == {"dpg": {"vqa": "mplug@./a=b"}}


@pytest.mark.parametrize(
    ("benchmarks", "judges", "message"),
    [
        ("geneval", "pp-ocr", "judge 'pp-ocr' answers as ocr, and geneval asks for detector, color"),
        ("geneval,oneig-text", "geneval=pp-ocr", "judge 'pp-ocr' answers as ocr, and geneval asks for detector"),
        ("geneval,geneval2", "pp-ocr", "geneval asks for detector, color; geneval2 asks for soft_tifa"),
        ("geneval,dpg", "eye=blip-vqa", "the skill 'eye', and geneval has detector, color; dpg has vqa"),
        ("dpg,oneig", "vqa=blip-vqa", "answers as vqa with the vocabulary 'yes', and oneig counts only 'Yes'"),
    ],
)
def test_a_judge_of_a_workflow_that_fits_nothing_is_refused(benchmarks, judges, message):
    with pytest.raises(ValueError, match=message):
        plan_benchmarks(benchmarks, {}, judges=judges)


def test_a_judge_of_a_workflow_is_taken_by_the_benchmarks_that_it_fits():
    geneval, text = plan_benchmarks("geneval,oneig-text", {}, judges="pp-ocr")
    assert text.judges == {"ocr": "pp-ocr"} and "pp-ocr" not in geneval.judges.values()


@pytest.mark.parametrize(
    ("benchmark", "judges", "problem"),
    [
        ("dpg", {"vqa": Says([0.5] * 1280)}, "must be text"),
        ("oneig", {"vqa": Says(1.0), "ocr": Says("")}, "must be text"),
        ("oneig", {"ocr": Says(None)}, "must be text"),
        ("oneig", {"reasoning": Says("0.5")}, "must be a finite number"),
        ("oneig", {"style": Says(float("nan"))}, "must be a finite number"),
        ("oneig", {"diversity": Says(0.3)}, "must be a list of finite numbers"),
        ("geneval", {"detector": Says(""), "color": Says([])}, "must be {class: "),
        ("geneval", {"detector": Says({"car": [{"score": 0.9}]}), "color": Says([])}, "must be {class: "),
        ("geneval2", {"soft_tifa": Says("")}, "must be a finite number"),
    ],
)
def test_an_answer_of_a_wrong_type_is_one_short_sentence_and_is_not_kept(benchmark, judges, problem, tmp_path):
    run = run_of(benchmark, tmp_path)
    with pytest.raises(ValueError, match=problem) as caught:
        judge_run(run, run / "judged", judges, log=quiet)
    assert "judge says" in str(caught.value) and len(str(caught.value)) < 400
    assert not any(problem in json.dumps(Answers(run / "judged")[key]) for key in Answers(run / "judged"))


def test_colours_are_one_for_each_box(tmp_path):
    car = {"box": [0, 0, 8, 8], "score": 0.99}
    detector = Says({name: [car, car] for name in ("car", "dog", "cat", "bench", "cup")})
    run = run_of("geneval", tmp_path)
    with pytest.raises(ValueError, match="must be a list of one text for each box"):
        judge_run(run, run / "judged", {"detector": detector, "color": Says(["red"] * 9)}, log=quiet)


def test_a_registered_name_is_checked_where_the_judge_itself_is_given(tmp_path):
    run = run_of("dpg", tmp_path)
    with pytest.raises(ValueError, match="'qwen2.5-vl-7b' .* the vocabulary 'Yes', and dpg counts only 'yes'"):
        judge_run(run, run / "judged", {"vqa": Says("Yes", "qwen2.5-vl-7b")}, log=quiet)


def test_answers_of_a_judge_that_does_not_fit_are_not_scored(tmp_path):
    """As an earlier version kept them."""
    run = run_of("dpg", tmp_path)
    judge_run(run, run / "judged", {"vqa": Says("")}, log=quiet)
    path = run / "judged" / "judges.json"
    path.write_text(path.read_text().replace('"name": "says"', '"name": "pp-ocr"'))
    with pytest.raises(ValueError, match="judge 'pp-ocr' answers as ocr, not as vqa of dpg"):
        rescore(run, run, judged=run / "judged", log=quiet)


def test_a_score_says_that_no_answer_has_the_word_that_counts(tmp_path):
    """Of a judge of your own, whose words the registry does not know. The official rule gives it 0, and so does ours."""
    run = run_of("dpg", tmp_path)
    notes = {}
    for number, reply in enumerate(("Yes", "yes", "no")):
        card = rescore(run, tmp_path / str(number), judges={"vqa": Says(reply)}, log=quiet)
        assert card["overall"]["mean"] == (reply == "yes")
        notes[reply] = [note for note in card["deviations"] if "counts only" in note]
    assert notes["yes"] == notes["no"] == []
    (note,) = notes["Yes"]
    assert note == "no answer is 'yes', and 12 are 'Yes' or the like: dpg counts only 'yes'"


def test_ls_lists_only_the_judges_that_fit(capsys):
    for benchmark, skill, judges in (
        ("dpg", "vqa", {"blip-vqa", "mplug", "qwen2.5-vl-7b-yes-no"}),
        ("oneig", "vqa", {"qwen2.5-vl-7b"}),
        ("geneval", "detector", {"ssd-mobilenet-v2", "mask2former-clip"}),
        ("shapes", "detector", {"shapes-detector"}),
    ):
        assert cli.main(["ls", benchmark]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  judge {skill}")]
        assert set(line.rpartition("; here ")[2].split(", ")) == judges <= JUDGES.keys()


class Stored:
    """Answers of other runs: one and the same to every question."""

    def __init__(self, answer):
        self.answer, self.rejected, self.added = answer, set(), {}

    def find(self, keys):
        return dict.fromkeys(keys, self.answer)

    def add(self, rows):
        self.added |= dict(rows)

    def reject(self, keys):
        self.rejected |= set(keys)


@pytest.mark.parametrize("planted", [["a list"], 10**400, None], ids=["list", "huge", "null"])
def test_an_answer_of_another_run_that_is_of_a_wrong_type_is_asked_again(tmp_path, planted):
    run, lines = run_of("dpg", tmp_path), []
    stored = Stored(planted)
    judge_run(run, run / "judged", {"vqa": Says("yes")}, shared=stored, log=lines.append)
    with Answers(run / "judged") as answers:
        assert {answers[key] for key in answers} == {"yes"}
        assert stored.rejected == set(answers) == stored.added.keys()
    assert any("are of a wrong type, and their questions are asked again" in line for line in lines)


def test_an_answer_of_another_run_that_is_of_the_right_type_is_not_asked_again(tmp_path):
    run, stored = run_of("dpg", tmp_path), Stored("no")
    judge_run(run, run / "judged", {"vqa": Says("yes")}, shared=stored, log=quiet)
    answers = Answers(run / "judged")
    assert not stored.rejected and {answers[key] for key in answers} == {"no"}
