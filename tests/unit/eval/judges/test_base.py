"""Specs, self-tests and the registry: the checks before a judge answers."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from eval import catalog
from eval.benchmarks import registry as benchmarks
from eval.config import EvalConfig
from eval.judges import base, registry, selftest
from eval.judging.protocols import Request, score_name


class Counting(base.BaseJudge):
    """Answers the mean of the image's values."""

    name = "counting"
    model = "mean"

    def __init__(self, version="1.0", error=0.0):
        super().__init__({"class": "Counting", "libraries": {"numpy": version}})
        self.error = error

    def answer_one(self, request):
        return {"mean": float(np.asarray(request.images[0]).mean()) + self.error, "text": request.text}

    def probes(self):
        return [base.Probe(Request([Image.new("L", (4, 4), 100)], "a"))]


@pytest.fixture
def records(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "RECORDS", tmp_path)
    return tmp_path


def test_the_revision_is_the_digest_of_the_spec():
    assert Counting("1.0").revision == Counting("1.0").revision != Counting("1.1").revision


def test_a_recorded_selftest_passes_and_another_answer_fails_it(records):
    Counting().record(records)
    Counting().selftest()
    Counting(error=0.5).selftest()  # between processors the last bits differ
    with pytest.raises(ValueError, match=r"counting fails its self-test: it answers .*110.* to probe 0, not .*100"):
        Counting(error=10).selftest()


def test_a_stale_selftest_names_what_changed(records):
    Counting("1.0").record(records)
    with pytest.raises(ValueError, match=r"stale: .*libraries\.numpy = '1\.0', and it is '1\.1'.*selftest counting"):
        Counting("1.1").selftest()


def test_a_damaged_record_is_named(records):
    (records / "counting.json").write_text('{"spec": {')
    with pytest.raises(ValueError, match=r"counting\.json is not the record of a self-test"):
        Counting().selftest()


def test_an_answer_that_any_weights_must_give_is_checked_without_a_record(records):
    class Expecting(Counting):
        def probes(self):
            return [base.Probe(super().probes()[0].request, {"mean": 7.0, "text": "a"})]

    with pytest.raises(ValueError, match="fails its self-test"):
        Expecting().selftest()


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (0.5, 0.505, True),
        (0.5, 0.6, False),
        ("yes", "Yes", False),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1.0}, {"b": 1.0}, False),
        (None, 0, False),
        (1000.0, 1010.0, True),
    ],
)
def test_answers_agree_when_only_their_last_digits_differ(a, b, equal):
    assert base.close(a, b) is equal and base.close(b, a) is equal


def test_weights_of_a_directory_are_known_by_their_bytes_and_are_not_official(tmp_path):
    save_file({"w": np.zeros(3)}, tmp_path / "model.safetensors")
    first = base.resolve("org/model", str(tmp_path))
    save_file({"w": np.ones(3)}, tmp_path / "model.safetensors")
    second = base.resolve("org/model", str(tmp_path))
    assert first.identity != second.identity and not first.official and first.identity.startswith("sha256:")


def test_a_directory_without_weights_and_a_file_of_other_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        base.resolve("org/model", str(tmp_path))
    (tmp_path / "w.pb").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"w\.pb has the SHA-256"):
        base.check_sha256(tmp_path / "w.pb", "0" * 64)


def test_weights_on_no_machine_are_one_clear_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="org/model at main is neither in the Hub's cache nor can it be downloaded"):
        base.resolve("org/model")


def test_an_unknown_judge_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no judge 'ssd-mobilenet-v1'; did you mean 'ssd-mobilenet-v2'"):
        EvalConfig(benchmark="geneval", judges={"detector": "ssd-mobilenet-v1"})
    with pytest.raises(ValueError, match="names no weights after '@'"):
        registry.check("qwen2.5-vl-7b@")


def test_a_judge_that_cannot_be_imported_or_takes_no_weights_is_one_clear_error():
    with pytest.raises(ValueError, match="judge 'no_such_module:judge' cannot be loaded"):
        registry.load("no_such_module:judge")
    with pytest.raises(ValueError, match="judge 'shapes-detector@somewhere' cannot be loaded"):
        registry.load("shapes-detector@somewhere")


def test_an_absent_package_is_named_before_hours_of_work_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for judge, message in (
        ("mplug@weights", r"needs modelscope, which is not installed: pip install --no-deps -r no-deps\.txt"),
        ("blip-vqa", ""),
    ):
        config = EvalConfig(benchmark="dpg", judges={"vqa": judge})
        if not message:
            catalog.check_installed(config)
            continue
        with pytest.raises(ValueError, match=message):
            catalog.check_installed(config)


def test_naming_every_judge_imports_no_heavy_library():
    code = (
        "import sys; from eval import catalog, config; from eval.judges.registry import JUDGES; "
        "[catalog.check_judge(n) for n in JUDGES]; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'cv2', 'rapidocr')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_judge_exists_and_its_skills_are_some_benchmarks():
    skills = {skill for name in benchmarks.BENCHMARKS for skill in benchmarks.load(name).judges}
    for name, entry in registry.JUDGES.items():
        module, _, attribute = entry.target.partition(":")
        judge = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert judge.name == name and set(entry.skills) <= skills and entry.description


def test_only_the_official_models_give_a_score_its_plain_name():
    for benchmark, judges, name in [
        ("oneig", dict.fromkeys(("vqa", "ocr"), "qwen2.5-vl-7b"), "oneig[qwen2.5-vl-7b]"),  # not all five skills
        ("geneval2", {"soft_tifa": "qwen3-vl-8b"}, "geneval2"),
        ("geneval", dict.fromkeys(("detector", "color"), "mask2former-clip"), "geneval[mask2former-clip]"),
        ("geneval", dict.fromkeys(("detector", "color"), "ssd-mobilenet-v2"), "geneval[ssd-mobilenet-v2]"),
        ("dpg", {"vqa": "qwen2.5-vl-7b-yes-no"}, "dpg[qwen2.5-vl-7b-yes-no]"),
        ("dpg", {"vqa": "mplug"}, "dpg[mplug]"),  # but for weights of pinned digests
        ("oneig", {"diversity": "dreamsim"}, "oneig[dreamsim]"),
    ]:
        record = {}
        for skill, judge in judges.items():
            module, _, attribute = registry.JUDGES[judge].target.partition(":")
            record[skill] = {"name": judge, "model": getattr(__import__(module, fromlist=[attribute]), attribute).model}
        assert score_name(benchmarks.load(benchmark), record) == name


def test_the_command_records_and_checks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(base, "RECORDS", tmp_path)
    assert selftest.main(["xkcd-color", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "xkcd-color.json").read_text())["answers"] == [["red", "blue", "white"]]
    assert selftest.main(["xkcd-color", "--check"]) == 0
    assert selftest.main(["shapes-detector"]) == 1
    assert "its own self-test" in capsys.readouterr().err


RULE = """
from eval.judges.base import BaseJudge


class Rule(BaseJudge):
    name, model = "rule", "a rule"

    def answer_one(self, request):
        return {answer}
"""


def test_the_revision_of_a_rule_changes_with_the_code_of_its_module_and_with_nothing_else(tmp_path, monkeypatch):
    def rule(folder, answer):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "some_rule.py").write_text(RULE.format(answer=answer))
        monkeypatch.syspath_prepend(str(tmp_path / folder))
        monkeypatch.delitem(sys.modules, "some_rule", raising=False)
        judge = importlib.import_module("some_rule").Rule()
        judge.selftest()  # nothing to compare with
        return judge

    first, same, other = rule("a", 1), rule("b", 1), rule("c", 2)
    assert first.spec["class"] == "some_rule.Rule" and "pillow" in first.spec["libraries"]
    assert first.revision == same.revision != other.revision
    assert other.answer([Request([], ""), Request([], "")]) == [2, 2]
