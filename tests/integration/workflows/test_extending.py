"""docs/extending.md, run as written: each section has at most ten lines of code, and what it adds works."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
TRAIN = """
import json, sys
from pathlib import Path
from train_helpers import train_config, training_stage, transformer_config, write_latents
import torch
from model.plan.memory import Shapes
from model.plan.memory_trace import Step, end_bytes
from model.train.run import train_stage

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
latents = write_latents(folder / "latents")
found = {}
for name in ("plain", "changed"):
    train = train_config(steps=2, checkpoint_every_steps=2, keep_checkpoints=1, log_every_steps=1)
    if name == "changed":
        sections = {key: {**getattr(train, key).model_dump(), **values} for key, values in changes.items()}
        train = type(train)(**{**train.model_dump(), **sections})
    (folder / name).mkdir()
    report = train_stage(latents, training_stage(train), None, folder / f"work_{name}", folder / name)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    step = Step(2, 16, 8, torch.float32, "none", losses=train.losses.model_copy(update={"wavelet": 0.0}))
    found[name] = {
        "norm": lines[0]["grad_norm"], "rates": [key for key in lines[0] if key.startswith("lr/")],
        "loss": lines[-1]["loss"], "bytes": end_bytes(transformer_config(), step).tail_peak,
        "trained": Shapes(transformer_config(), train.optim.matrices).trained,
    }
print("FOUND", json.dumps(found))
"""


def blocks(section: str) -> dict[str, list[str]]:
    """Language -> code blocks of a section of the document, in order."""
    text = (ROOT / "docs" / "extending.md").read_text()
    body = re.search(rf"^## {section}\n(.*?)(?=^## )", text, re.M | re.S)[1]
    result: dict[str, list[str]] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", body, re.S):
        result.setdefault(language, []).append(code)
    return result


def followed(folder: Path, section: str, config_class: str, replaced: str, file: str) -> dict:
    """A copy of model/ with the section's changes, trained without and with its recipe's settings."""
    shutil.copytree(ROOT / "model", folder / "model")
    code = blocks(section)
    config = folder / "model" / "config.py"
    text = config.read_text()
    begin = text.index(f"class {config_class}(")
    line = re.compile(rf"^    {replaced}.*\n", re.M).search(text, begin)
    config.write_text(
        text[: line.start()] + code["python"][0] + text[line.end() if "matrices" in replaced else line.start() :]
    )
    with open(folder / "model" / file, "a") as source:
        source.write("\n\n" + code["python"][1])
    changes = yaml.safe_load(code["yaml"][0])["train"]
    path = f"{folder}:{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), json.dumps(changes)],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.rindex("FOUND ") + 6 :])


@pytest.mark.slow
def test_a_loss_is_trained_and_planned_after_a_field_and_a_function(tmp_path):
    actual = followed(tmp_path, "A loss", "LossConfig", "router_z_loss", "losses.py")
    plain, changed = actual["plain"], actual["changed"]
    assert changed["norm"] > plain["norm"] and changed["loss"] != plain["loss"]
    assert changed["bytes"] > plain["bytes"]


@pytest.mark.slow
def test_an_optimiser_trains_and_is_planned_after_a_name_and_an_entry(tmp_path):
    actual = followed(tmp_path, "An optimiser", "OptimConfig", "matrices", "optim.py")
    plain, changed = actual["plain"], actual["changed"]
    assert plain["rates"] == ["lr/Muon", "lr/AdamW"] and set(changed["rates"]) == {"lr/SGD", "lr/AdamW"}
    assert changed["loss"] != plain["loss"]
    assert changed["trained"]["sgd"] == plain["trained"]["muon"] > 0 == changed["trained"]["muon"]


SECTIONS = ("A source", "A made source", "A scorer", "A captioner", "A benchmark", "A judge", "A loss", "An optimiser")
MOST_LINES, LINE_LENGTH = 10, 120


@pytest.mark.parametrize("section", SECTIONS)
def test_an_addition_has_at_most_ten_lines_with_its_registration_and_recipe(section):
    """Lines of the formatter's length with one statement each: no line stands for two."""
    code = blocks(section)
    lines = [line for block in itertools.chain(*code.values()) for line in block.splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= LINE_LENGTH and len(code["python"]) >= 2
    for block in code["python"]:
        statements = [node.lineno for node in ast.walk(ast.parse(textwrap.dedent(block))) if isinstance(node, ast.stmt)]
        assert len(set(statements)) == len(statements), block


def added_module(monkeypatch, folder: Path, section: str, name: str) -> dict[str, list[str]]:
    """Writes the module that a section adds into `folder`, as if it were in the package. Returns the section's code."""
    code = blocks(section)
    package, _, module = name.rpartition(".")
    assert f"`{name.replace('.', '/')}.py`" in (ROOT / "docs" / "extending.md").read_text()
    (folder / f"{module}.py").write_text(code["python"][0])
    path = importlib.import_module(package).__path__
    monkeypatch.setattr(sys.modules[package], "__path__", [*path, str(folder)])
    monkeypatch.setitem(sys.modules, name, None)  # restores its absence
    del sys.modules[name]
    importlib.invalidate_caches()
    return code


@pytest.fixture
def added(tmp_path) -> Path:
    """A folder for modules that a section adds."""
    folder = tmp_path / "added"
    folder.mkdir()
    return folder


def test_a_container_format_is_scanned_and_read_after_a_module_and_an_entry(monkeypatch, tmp_path, added):
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources import base, formats

    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / "shapes.zip", "w") as archive:
        archive.writestr("a.png", b"first")
        archive.writestr("a.txt", "a red square")
        archive.writestr("notes.doc", b"")
        archive.writestr("b.png", b"second")
        archive.writestr("b.txt", "a blue circle")
    with pytest.raises(ValueError, match=r"has no image; left out: 1 x \.zip"):
        base.write_corpus(SourceConfig(), str(source), tmp_path / "none")
    code = added_module(monkeypatch, added, "A source", "tasks.curation.sources.zips")
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS | eval(code["python"][1]))
    report = base.write_corpus(SourceConfig(), str(source), tmp_path / "corpus")
    assert (report["shards"], report["images"]) == (1, 2)
    corpus, account = base.open_corpus(tmp_path / "corpus"), base.Account()
    (shard,) = corpus.shards()
    records = [(record.data, record.captions, record.row) for record in corpus.read(shard, account)]
    assert shard.kind == "zip" and records == [(b"first", ["a red square"], 0), (b"second", ["a blue circle"], 1)]
    assert account.records == 2 and account.left_out() == "1 x .doc (shapes.zip:notes.doc)"
    (source / "shapes.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"shapes\.zip cannot be read: File is not a zip file"):
        base.write_corpus(SourceConfig(), str(source), tmp_path / "broken")


def test_a_made_source_gives_records_after_a_function_and_an_entry(monkeypatch, tmp_path, added):
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources import base
    from tasks.curation.sources.made import registry
    from tasks.recipe import Recipe, load_recipe

    code = added_module(monkeypatch, added, "A made source", "tasks.curation.sources.made.gradients")
    section = yaml.safe_load(code["yaml"][0])["source"]
    smoke = load_recipe("smoke").model_dump()
    with pytest.raises(ValueError, match="source.made.gradients=6 is unknown; use one of digits"):
        Recipe(**smoke | {"source": smoke["source"] | section})
    monkeypatch.setattr(registry, "SOURCES", registry.SOURCES | eval(code["python"][1]))
    Recipe(**smoke | {"source": smoke["source"] | section})

    def records(shards: int) -> dict[str, base.Record]:
        config = SourceConfig(**section | {"shards": shards, "digits": 3})
        parts = [tmp_path / f"{shards}-{index}" for index in range(shards)]
        for index, part in enumerate(parts):
            base.write_made_shard(config, index, part)
        report = base.made_corpus(parts, tmp_path / f"corpus-{shards}")
        assert report["sources"] == {"digits": 3, "gradients": 6}
        corpus = base.open_corpus(tmp_path / f"corpus-{shards}")
        read = [record for shard in corpus.shards() for record in corpus.read(shard, base.Account())]
        return {record.key: record._replace(locator="", row=0) for record in read}

    made = records(2)
    assert len(made) == 9 and made == records(1)
    first = made["gradients-0000000"]
    assert first.source == "gradients" and first.captions[0].startswith("a gradient from [")


def test_a_scorer_scores_after_a_function_and_an_entry(monkeypatch, added):
    from tasks.curation import scorers
    from tasks.curation.config import ScorerConfig

    code = added_module(monkeypatch, added, "A scorer", "tasks.curation.scorers.contrast")
    config = ScorerConfig(**yaml.safe_load(code["yaml"][0])["curation"]["scorers"])
    with pytest.raises(ValueError, match="aesthetic='contrast' is unknown"):
        scorers.chosen_scorers(config)
    entry = eval(code["python"][1], vars(scorers))
    monkeypatch.setattr(scorers, "SCORERS", (*scorers.SCORERS, entry))
    (one,) = [one for one in scorers.chosen_scorers(config) if one.columns == ("aesthetic",)]
    scorer = scorers.build_scorer(one)
    gray = np.zeros((8, 8), np.uint8)
    half = gray.copy()
    half[:4] = 255
    samples = [scorers.Sample(Image.fromarray(g), np.stack([g] * 3, -1), g, ()) for g in (gray, half)]
    assert scorer(samples)["aesthetic"].tolist() == [0.0, 1.0]
    assert scorers.scorer_revisions(config)["aesthetic"].startswith("contrast, code ")


def test_a_benchmark_and_its_judge_score_after_a_class_and_an_entry_each(monkeypatch, tmp_path, added):
    from eval import catalog
    from eval.benchmarks import base, registry
    from eval.config import EvalConfig
    from eval.judges import registry as judge_registry
    from eval.scorecard import evaluate

    benchmark_code = added_module(monkeypatch, added, "A benchmark", "eval.benchmarks.walls")
    judge_code = added_module(monkeypatch, added, "A judge", "eval.judges.gray_level")
    recipe = yaml.safe_load(benchmark_code["yaml"][0])["eval"]
    with pytest.raises(ValueError, match="there is no benchmark 'walls'"):
        EvalConfig(**recipe)
    monkeypatch.setattr(registry, "BENCHMARKS", registry.BENCHMARKS | eval(benchmark_code["python"][1]))
    config = EvalConfig(**recipe)
    with pytest.raises(ValueError, match="there is no judge 'gray-level'"):
        catalog.load_judges(config)
    entry = eval(judge_code["python"][1], vars(judge_registry))
    monkeypatch.setattr(judge_registry, "JUDGES", judge_registry.JUDGES | entry)

    def white(prompts, seeds, height, width):  # right for one of the two prompts
        return [Image.new("RGB", (width, height), "white")] * len(prompts)

    config = config.model_copy(update={"image_size_px": 8, "seeds": (0,)})
    card = evaluate(white, config, tmp_path, log=lambda _: None)
    assert (card["name"], card["pooling"], card["overall"]["mean"]) == ("walls", "prompts", 0.5)
    assert card["fixed"]["overall"] == 0.5 and card["counts"]["scored"] == 2 and not card["deviations"]
    assert [judge["name"] for judge in card["settings"]["judges"]] == ["gray-level"]
    benchmark = registry.load("walls")
    assert benchmark.score(catalog.prompts(config)[0], base.Judged((None,))).score is None

    catalog.check_installed(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="judge 'gray-level' needs PIL, which is not installed: pip install pillow"):
        catalog.check_installed(config)


def test_every_loss_and_optimiser_of_a_recipe_has_its_function():
    from typing import get_args

    from model.config import LossConfig, OptimConfig
    from model.losses import AFTER_STEP, LOSSES
    from model.optim import OPTIMIZERS

    assert set(LossConfig.model_fields) == {*LOSSES, *AFTER_STEP}
    assert set(get_args(OptimConfig.model_fields["matrices"].annotation)) == set(OPTIMIZERS)


def test_a_captioner_describes_after_a_class_and_an_entry(monkeypatch, added):
    from tasks.curation import captioning
    from tasks.curation.captioning import checks
    from tasks.curation.config import CaptionerConfig

    code = added_module(monkeypatch, added, "A captioner", "tasks.curation.captioning.colors")
    spec = eval(code["python"][1], {"CaptionerSpec": captioning.CaptionerSpec})
    monkeypatch.setattr(captioning, "CAPTIONERS", (*captioning.CAPTIONERS, spec))
    config = CaptionerConfig(**yaml.safe_load(code["yaml"][0])["curation"]["captioner"])
    image = Image.new("RGB", (8, 8), (20, 30, 200))
    request = captioning.Request("0" * 64, "short", 1, image, config.prompt("A1", "short"), 64, 1)
    ((_, answer),) = captioning.build_captioner(config).answers([request])
    assert checks.judge(answer, config.lengths["short"], config.language) == ("a picture that is bluish", "ok")
    assert captioning.identity(config) == "colors@1"
