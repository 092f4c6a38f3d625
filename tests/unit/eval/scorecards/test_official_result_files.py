"""Scoring also writes the official result files: the official formulas, written out here, give the card's numbers from
them."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import official_data
import pandas as pd
import pytest
from PIL import Image

from eval import catalog, cli, dpg, geneval2
from eval.benchmarks.oneig import OCR_PROMPT
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judging.protocols import Request
from eval.official.oneig_files import read_scores
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
    """Random answers of each skill, determined by image and question."""

    def __init__(self, skill):
        self.skill = self.name = skill
        self.model, self.spec = "dice", {"skill": skill}
        self.revision = hashlib.sha256(skill.encode()).hexdigest()

    def selftest(self):
        pass

    def answer(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        seen = [hashlib.sha256(image.tobytes() + request.text.encode()).digest() for image in request.images]
        rng = np.random.default_rng(list(seen[0]))
        if self.skill == "detector":

            def result():
                x, y = rng.uniform(0, 60, 2)
                return {"box": [x, y, x + 9, y + 9], "score": float(rng.uniform(0.85, 1))}

            return {name: [result() for _ in range(rng.integers(1, 4))] for name in ("car", "dog", "cat")}
        if self.skill == "color":
            return [str(rng.choice(["red", "red", "blue"])) for _ in request.options["boxes"]]
        if self.skill == "ocr":
            return str(rng.choice(["Open", "Shut", "Opn", ""]))
        if self.skill == "diversity":
            return [float(rng.random()) for i in range(len(seen)) for _ in range(i)]
        if self.skill == "vqa":
            return "no" if rng.random() < 0.3 else "Yes" if "'Yes'" in request.text else "yes"
        return float(rng.random())


def scored(benchmark, prompts_file, images, folder, **changes):
    """A run that the command has scored."""
    config = EvalConfig(benchmark=benchmark, prompts_file=str(prompts_file), seeds=(0, 3), images_per_prompt=images, image_size_px=8, **changes)  # fmt: skip
    generate(noise, catalog.prompts(config), config, folder, log=quiet)
    judges = {skill: Dice(skill) for skill in catalog.benchmark(benchmark).judges}
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
    scores, categories, read = [], [], []
    questions = dpg.load_questions(csv_file)
    for folder in folders:
        read.append(dpg.summarise(dpg.read_details(folder / "dpg-bench_results_detail.txt", questions), questions))
        lines = (folder / "dpg-bench_results.txt").read_text().splitlines()
        results = lines[: lines.index("Model: model (dpg[vqa])")]  # not by the official judge
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
    assert [summary["score"] for summary in read] == pytest.approx(scores)
    for kind in ("entity - whole", "entity - part", "attribute - color"):
        assert card.official["categories"][kind] == pytest.approx(mean(c[kind] for c in categories))
        assert [summary["categories"][kind] for summary in read] == pytest.approx([c[kind] for c in categories])


def shown_to_judges(folder, prompt_index):
    """The four tiles of a prompt after OneIG's JPEG compression."""
    tiles = []
    for number in range(4):
        buffer = io.BytesIO()
        with Image.open(folder / f"{prompt_index:05d}" / "samples" / f"{number:04d}.png") as tile:
            tile.save(buffer, format="JPEG")
        tiles.append(Image.open(buffer))
        tiles[-1].load()
    return tiles


def edits(a, b):
    """The edit distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def oneig_by_definition(folder):
    """Each CSV's columns for `official_data.write_oneig`, from what the judges say about one seed's tiles."""
    anime = {0: "anime_000", 1: "anime_001"}
    text = {2: ("text_000", "Open"), 3: ("text_001", "Shut")}
    names = {**anime, **{index: name for index, (name, _) in text.items()}, 4: "reasoning_000"}

    def said(skill, index, words=""):
        return [Dice(skill).one(Request([tile], words)) for tile in shown_to_judges(folder, index)]

    alignment = {}
    for index, name in anime.items():
        cat, black = (
            said("vqa", index, f"{q} Please answer 'Yes' or 'No' only.") for q in ("Is it a cat?.", "Is it black?.")
        )
        # "Is it black?" depends on "Is it a cat?".
        alignment[name] = mean((c == "Yes") / 2 + (c == b == "Yes") / 2 for c, b in zip(cat, black, strict=True))
    reads = [(wanted, read) for index, (_, wanted) in text.items() for read in said("ocr", index, OCR_PROMPT)]
    ed, right = mean(edits(wanted, read) for wanted, read in reads), mean(wanted == read for wanted, read in reads)
    text_score = 1 - min(100, ed) * (1 - right) * (1 - right) / 100  # one word each: WAC is CR
    style = mean(said("style", 1))
    diversity = {}
    for index, name in names.items():
        diversity[name] = mean(Dice("diversity").one(Request(shown_to_judges(folder, index), "")))
    classes = {
        c: mean(v for name, v in diversity.items() if name.startswith(c)) for c in ("anime", "text", "reasoning")
    }
    return {
        "alignment": {"alignment": mean(alignment.values())},
        "text": {"ED": ed, "CR": right, "WAC": right, "text score": text_score},
        "reasoning": {"reasoning": mean(said("reasoning", 4, "the answer"))},
        "style": {"style": style},
        "diversity": {**classes, "total average": mean(diversity.values())},
        "style_style": {"line_art": style},
    }


def test_oneigs_csvs_and_the_card_have_each_dimension_by_its_definition(tmp_path):
    card, folders = scored("oneig", official_data.write_oneig(tmp_path), 4, tmp_path / "run")
    official = card.official["categories"]
    assert set(official) == {"alignment", "text", "reasoning", "style", "diversity"}
    page = (tmp_path / "run" / "scorecard.html").read_text()
    assert {"Nucleus-Image", "Qwen-Image"} <= {row.model for row in card.references} and "2508.02324" in page
    names = {f"{kind}_{what}_EN.csv" for kind in official for what in ("score", "prompt_score")}
    by_seed = []
    for seed, folder in zip((0, 3), folders, strict=True):
        assert {path.name for path in folder.iterdir()} == names | {"style_style_score_EN.csv"}
        by_seed.append(oneig_by_definition(tmp_path / "run" / "images" / f"seed{seed}"))
        for dimension, columns in by_seed[-1].items():
            table = pd.read_csv(folder / f"{dimension}_score_EN.csv", index_col=0)
            assert list(table.index) == ["model (oneig[diversity+ocr+reasoning+style+vqa])"]
            assert table.iloc[0].dropna().to_dict() == pytest.approx(columns)
            (row,) = read_scores(folder / f"{dimension}_score_EN.csv").values()
            assert {name: value for name, value in row.items() if value is not None} == pytest.approx(columns)
        ocr = pd.read_csv(folder / "text_prompt_score_EN.csv", index_col=0, dtype={0: str}).iloc[:, 0]
        ed, cr, wac = zip(*map(json.loads, ocr), strict=True)
        assert [mean(values) for values in (ed, cr, wac)] == pytest.approx(list(by_seed[-1]["text"].values())[:3])
    for dimension, column in (("alignment", "alignment"), ("reasoning", "reasoning"), ("style", "style"), ("diversity", "total average"), ("text", "text score")):  # fmt: skip
        assert official[dimension] == pytest.approx(mean(of[dimension][column] for of in by_seed)), dimension
    assert len(set(official.values())) == 5


@pytest.mark.parametrize("skipped", [(0, 1), (2, 3), (3, 2), (0, 0)], ids=str)
def test_a_black_tile_is_left_out_as_the_official_code_does(tmp_path, skipped):
    """A safety checker gives black images. The card is that of judging the tiles of the exported grids that are not."""
    place, number = skipped  # prompt, image

    def with_black(prompts, seeds, height, width):
        images = noise(prompts, seeds, height, width)
        return [Image.new("RGB", image.size) if blacks.pop(0) else image for image in images]

    checkout = official_data.write_oneig(tmp_path)
    config = EvalConfig(benchmark="oneig", prompts_file=str(checkout), seeds=(0,), images_per_prompt=4, image_size_px=8)
    blacks = [(i, j) == skipped for i in range(5) for j in range(4)]
    generate(with_black, catalog.prompts(config), config, tmp_path / "run", log=quiet)
    benchmark = catalog.benchmark("oneig")
    judges = {skill: Dice(skill) for skill in benchmark.judges}
    card = rescore(tmp_path / "run", tmp_path / "run", config, judges=judges, log=quiet)
    samples = tmp_path / "run/images/seed0" / f"{place:05d}" / "samples"
    with Image.open(samples / f"{number:04d}.png") as image:
        assert image.getextrema() == ((0, 0),) * 3
    (samples / f"{number:04d}.png").unlink()  # as if there had never been one
    without = config.model_copy(update={"missing": "official"})
    other = rescore(tmp_path / "run", tmp_path / "other", without, judges=judges, log=quiet)
    assert card["official"] == other["official"] and card["overall"]["mean"] == other["overall"]["mean"]
    assert "1 black images were left out, as the official code does" in card["deviations"]
    assert card["counts"] == {"expected": 20, "generated": 20, "scored": 19, "failed": 1}


def test_the_text_before_a_prompt_with_only_black_tiles_is_counted_again_officially(tmp_path):
    checkout = official_data.write_oneig(tmp_path)
    config = EvalConfig(
        benchmark="oneig-text", prompts_file=str(checkout), seeds=(0,), images_per_prompt=4, image_size_px=8
    )
    blacks = [False] * 4 + [True] * 4

    def second_black(prompts, seeds, height, width):
        return [Image.new("RGB", i.size) if blacks.pop(0) else i for i in noise(prompts, seeds, height, width)]

    class Reads(Dice):
        def one(self, request):
            return "Open"

    generate(second_black, catalog.prompts(config), config, tmp_path / "run", log=quiet)
    card = rescore(tmp_path / "run", tmp_path / "run", config, judges={"ocr": Reads("ocr")}, log=quiet)
    # "Open" four times for the prompt "Open", and again for the black picture of the prompt "Shut".
    table = pd.read_csv(tmp_path / "run/official/seed0/text_score_EN.csv", index_col=0)
    assert table["CR"].item() == 0.5 and card["fixed"]["overall"] == 1


def test_geneval2s_lists_have_the_cards_means(tmp_path):
    card, folders = scored("geneval2", official_data.write_geneval2(tmp_path), 1, tmp_path / "run")
    lists = [json.loads((folder / "score_lists.json").read_text()) for folder in folders]
    assert [len(values) for values in lists[0]] == [2, 2, 1]
    assert [geneval2.read_scores(folder / "score_lists.json") for folder in folders] == lists
    read = [geneval2.summarise(of_seed, official_data.GENEVAL2) for of_seed in lists]
    geometric = [100 * mean(np.exp(np.mean(np.log(values))) for values in of_seed) for of_seed in lists]
    assert card.official["overall"] == pytest.approx(mean(geometric))
    assert [summary["gm"] for summary in read] == pytest.approx(geometric)
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
        judges = {skill: Dice(skill) for skill in catalog.benchmark(name).judges}
        rescore(run, run, config, judges=judges, log=quiet)
    assert not (tmp_path / "geneval2" / "official").exists()
    table = pd.read_json(tmp_path / "geneval/official/seed0/results.jsonl", lines=True)
    assert list(table["filename"]) == ["00000/samples/0000.png", "00002/samples/0000.png"]
