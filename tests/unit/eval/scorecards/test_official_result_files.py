"""Scoring also writes the official result files: the official formulas, written out here, give the card's numbers from
them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import official_data
import pandas as pd
import pytest
from PIL import Image

from eval import catalog, cli
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.scorecard import judge_run, rescore
from eval.scorecards.card import load


def quiet(_):
    pass


def noise(prompts, seeds, height, width):
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        for seed in seeds
    ]


class Dice:
    """Random answers of each role, determined by image and question."""

    def __init__(self, role):
        self.role = self.name = role
        self.model, self.spec = "dice", {"role": role}
        self.revision = hashlib.sha256(role.encode()).hexdigest()

    def selftest(self):
        pass

    def answer(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        seen = [hashlib.sha256(image.tobytes() + request.text.encode()).digest() for image in request.images]
        rng = np.random.default_rng(list(seen[0]))
        if self.role == "detector":

            def found():
                x, y = rng.uniform(0, 60, 2)
                return {"box": [x, y, x + 9, y + 9], "score": float(rng.uniform(0.85, 1))}

            return {name: [found() for _ in range(rng.integers(1, 4))] for name in ("car", "dog", "cat")}
        if self.role == "color":
            return [str(rng.choice(["red", "red", "blue"])) for _ in request.options["boxes"]]
        if self.role == "ocr":
            return str(rng.choice(["Open", "Shut", "Opn", ""]))
        if self.role == "diversity":
            return [float(rng.random()) for i in range(len(seen)) for _ in range(i)]
        if self.role == "vqa":
            return "no" if rng.random() < 0.3 else "Yes" if "'Yes'" in request.text else "yes"
        return float(rng.random())


def scored(benchmark, prompts_file, images, folder, **changes):
    """A run that the command has scored."""
    config = EvalConfig(benchmark=benchmark, prompts_file=str(prompts_file), seeds=(0, 3), images_per_prompt=images, image_size_px=8, **changes)  # fmt: skip
    generate(noise, catalog.prompts(config), config, folder, log=quiet)
    judges = {role: Dice(role) for role in catalog.benchmark(benchmark).judges}
    judge_run(folder, folder / "judged", judges, config, log=quiet)
    assert cli.main(["score", str(folder)]) == 0
    return load(folder), [folder / "official" / f"seed{seed}" for seed in (0, 3)]


def mean(values):
    return float(np.mean(list(values)))


def test_genevals_summary_of_results_jsonl_is_the_cards(tmp_path, capsys):
    card, folders = scored("geneval", official_data.write_geneval(tmp_path), 4, tmp_path / "run")
    assert str(tmp_path / "run" / "official") in capsys.readouterr().out
    tables = [pd.read_json(folder / "results.jsonl", orient="records", lines=True) for folder in folders]
    assert 0 < card.official["overall"] < 1
    assert card.official["overall"] == pytest.approx(mean(t.groupby("tag")["correct"].mean().mean() for t in tables))
    for tag, accuracy in card.official["categories"].items():
        assert accuracy == pytest.approx(mean(t[t["tag"] == tag]["correct"].mean() for t in tables))
    table = tables[0]
    assert list(table.columns) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert list(table["filename"][:2]) == ["00000/samples/0000.png", "00000/samples/0001.png"] and len(table) == 12
    # Of the official metadata, whose text is the key by which the official summary groups images.
    assert [json.loads(text) for text in dict.fromkeys(table["metadata"])] == official_data.GENEVAL
    assert table["metadata"].nunique() == 3
    for details in table["details"]:
        assert all(len(box) == 5 and box[4] > 0.3 for boxes in json.loads(details).values() for box in boxes)
    wrong = table[~table["correct"]]
    assert len(wrong) and wrong["reason"].str.startswith("expected ").all()


def test_dpgs_lines_have_the_cards_score_and_its_details_the_categories(tmp_path):
    csv_file = official_data.write_dpg(tmp_path)
    card, folders = scored("dpg", csv_file, 4, tmp_path / "run")
    kinds = pd.read_csv(csv_file).set_index("question_natural_language")["tuple"].str.split("(").str[0].str.strip()
    scores, categories = [], []
    for folder in folders:
        lines = (folder / "dpg-bench_results.txt").read_text().splitlines()
        results = lines[: lines.index("Model: model")]
        assert [line.split(", ")[0] for line in results] == ["7.png", "ü.png"]  # the first prompt fails officially
        for line in results:
            *images, whole = map(float, line.split(", ")[1:])
            assert len(images) == 4 and whole == pytest.approx(mean(images))
        scores.append(100 * mean(float(line.split(", ")[-1]) for line in results))
        assert f"DPG-Bench score: {scores[-1]}" in lines
        answers = {}
        details = (folder / "dpg-bench_results_detail.txt").read_text().splitlines()
        for line in details:
            rest, answer = line.rsplit(", ", 1)
            name, _, rest = rest.partition(", (")
            box, _, question = rest.partition("), ")
            answers.setdefault(kinds[question], {}).setdefault(name, {})[question] = answer == "yes"  # the last image's
        assert len(details) == 4 * 4 and box == "8, 8, 16, 16"
        categories.append({kind: 100 * mean(v for named in of.values() for v in named.values()) for kind, of in answers.items()})  # fmt: skip
    assert card.official["overall"] == pytest.approx(mean(scores)) != card.fixed["overall"]
    for kind in ("entity - whole", "entity - part", "attribute - color"):
        assert card.official["categories"][kind] == pytest.approx(mean(c[kind] for c in categories))


def test_oneigs_csvs_have_the_cards_dimensions(tmp_path):
    card, folders = scored("oneig", official_data.write_oneig(tmp_path), 4, tmp_path / "run")
    official = card.official["categories"]
    assert set(official) == {"alignment", "text", "reasoning", "style", "diversity"}
    page = (tmp_path / "run" / "scorecard.html").read_text()
    assert {"Nucleus-Image", "Qwen-Image"} <= {row.model for row in card.references} and "2508.02324" in page
    names = {f"{kind}_{what}_EN.csv" for kind in official for what in ("score", "prompt_score")}
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == names | {"style_style_score_EN.csv"}

    def tables(name):
        return [pd.read_csv(folder / f"{name}_EN.csv", index_col=0) for folder in folders]

    for dimension, column in (("alignment", "alignment"), ("reasoning", "reasoning"), ("style", "style"), ("diversity", "total average"), ("text", "text score")):  # fmt: skip
        assert official[dimension] == pytest.approx(mean(t[column].iloc[0] for t in tables(f"{dimension}_score")))
    for dimension in ("alignment", "reasoning"):  # means over prompts
        assert official[dimension] == pytest.approx(
            mean(t["model"].mean() for t in tables(f"{dimension}_prompt_score"))
        )
    for table, prompts in zip(tables("text_score"), tables("text_prompt_score"), strict=True):
        ed, cr, _ = zip(*map(json.loads, prompts["model"]), strict=True)
        assert (mean(ed), mean(cr)) == (pytest.approx(table["ED"].iloc[0]), pytest.approx(table["CR"].iloc[0]))


def test_geneval2s_lists_have_the_cards_means(tmp_path):
    card, folders = scored("geneval2", official_data.write_geneval2(tmp_path), 1, tmp_path / "run")
    lists = [json.loads((folder / "score_lists.json").read_text()) for folder in folders]
    assert [len(values) for values in lists[0]] == [2, 2, 1]
    geometric = [100 * mean(np.exp(np.mean(np.log(values))) for values in of_seed) for of_seed in lists]
    assert card.official["overall"] == pytest.approx(mean(geometric))
    counts = [100 * mean([of_seed[0][0], of_seed[2][0]]) for of_seed in lists]
    assert card.official["categories"]["count"] == pytest.approx(mean(counts))


def test_files_of_an_earlier_score_are_gone_and_a_benchmark_without_official_code_has_none(tmp_path):
    run = tmp_path / "run"
    _, folders = scored("geneval2", official_data.write_geneval2(tmp_path), 1, run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (folders[0] / "score_lists.json").write_text("[]")
    (folders[0] / "old.csv").touch()
    rescore(run, run, judged=run / "judged", log=quiet)
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for name in ("shapes", "captions"):
        assert catalog.benchmark(name).official_files([], {}, 8) == {}


def test_an_image_that_is_missing_leaves_geneval2_without_the_official_file_and_genevals_without_its_row(tmp_path):
    for name, write in (("geneval2", official_data.write_geneval2), ("geneval", official_data.write_geneval)):
        run = tmp_path / name
        data = write(tmp_path)
        config = EvalConfig(benchmark=name, prompts_file=str(data), seeds=(0,), image_size_px=8, missing="official")
        generate(noise, catalog.prompts(config), config, run, log=quiet)
        (run / "images/seed0/00001/samples/0000.png").unlink()
        judges = {role: Dice(role) for role in catalog.benchmark(name).judges}
        rescore(run, run, config, judges=judges, log=quiet)
    assert not (tmp_path / "geneval2" / "official").exists()
    table = pd.read_json(tmp_path / "geneval/official/seed0/results.jsonl", lines=True)
    assert list(table["filename"]) == ["00000/samples/0000.png", "00002/samples/0000.png"]
