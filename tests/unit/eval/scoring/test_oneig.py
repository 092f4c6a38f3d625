"""OneIG-Bench's rule: tiles, alignment, text, style, diversity, reasoning, and the official CSVs."""

import io
import random

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval import oneig
from eval.official.oneig_files import read_prompt_scores, read_scores


def grid(*tiles, columns=2, size=8):
    """A picture of `size`-pixel tiles, each a colour."""
    image = Image.new("RGB", (columns * size, -(-len(tiles) // columns) * size))
    for i, color in enumerate(tiles):
        image.paste(
            color, (i % columns * size, i // columns * size, (i % columns + 1) * size, (i // columns + 1) * size)
        )
    return image


def color(data):
    return Image.open(io.BytesIO(data)).resize((1, 1)).getpixel((0, 0))


def test_tiles_come_row_by_row_without_the_black_ones():
    tiles = oneig.split_grid(grid("red", "black", "lime", "blue"))
    assert [max(range(3), key=color(t).__getitem__) for t in tiles] == [0, 1, 2]
    assert len(oneig.split_grid(grid("black", "black", "black", "#000001"))) == 1
    assert oneig.split_grid(grid("black", "black", "black", "black")) == []


def test_a_grid_is_columns_by_rows_and_its_rest_is_cut_off():
    image = grid("red", "lime", "blue", columns=3)
    assert len(oneig.split_grid(image, (3, 1))) == 3
    wide = Image.new("RGB", (11, 7), "white")
    assert [Image.open(io.BytesIO(t)).size for t in oneig.split_grid(wide, (2, 3))] == [(5, 2)] * 6
    with pytest.raises(ValueError, match="each at least 1"):
        oneig.split_grid(image, (0, 1))


def test_tiles_are_the_files_that_pillow_saves(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.crop((16, 0, 32, 16)).save(tmp_path / "1.jpg")
    assert oneig.split_grid(image)[1] == (tmp_path / "1.jpg").read_bytes()


def test_a_picture_with_transparency_needs_the_fixed_mode():
    image = grid("red", "black", "lime", "blue").convert("RGBA")
    with pytest.raises(ValueError, match="mode RGBA must be RGB"):
        oneig.split_grid(image)
    assert oneig.split_grid(image, mode="fixed") == oneig.split_grid(image.convert("RGB"))


def test_black_grey_pictures_are_kept_officially():
    image = Image.new("L", (4, 4))
    assert len(oneig.split_grid(image)) == 4 and oneig.split_grid(image, mode="fixed") == []


def alignment_by_definition(answers, dependency, tiles):
    total = 0
    for t in range(tiles):
        said = {q: texts[t] == "Yes" for q, texts in answers.items()}
        total += np.mean([said[q] and all(said.get(p, True) for p in dependency.get(q, [0])) for q in answers])
    return total / tiles


def test_alignment_equals_its_definition_on_random_graphs():
    rng = random.Random(0)
    for _ in range(300):
        n, tiles = rng.randint(1, 7), rng.randint(1, 4)
        dependency = {q: rng.sample(range(n + 3), rng.randint(0, 3)) for q in range(1, n + 1)}
        answers = {q: rng.choices(["Yes", "No", "yes", "Yes."], [6, 2, 1, 1], k=tiles) for q in range(1, n + 1)}
        expected = alignment_by_definition(answers, dependency, tiles)
        assert oneig.alignment_score(answers, dependency) == pytest.approx(expected)


def test_a_no_zeroes_its_children_but_not_their_children():
    answers = {1: ["No"], 2: ["Yes"], 3: ["Yes"]}
    assert oneig.alignment_score(answers, {1: [0], 2: [1], 3: [2]}) == pytest.approx(1 / 3)


def test_only_tiles_that_are_kept_count():
    assert oneig.alignment_score({1: ["Yes", "No"]}, {1: [0]}, 1) == 1
    assert oneig.alignment_score({1: []}, {1: [0]}) is None
    assert oneig.alignment_score({1: ["Yes"]}, {1: [0]}, 0) is None
    with pytest.raises(ValueError, match="fewer than 2"):
        oneig.alignment_score({1: ["Yes"]}, {1: [0]}, 2)
    with pytest.raises(ValueError, match="from 1 up"):
        oneig.alignment_score({2: ["Yes"]}, {2: [0]})


@pytest.mark.parametrize("text, expected", [
    ("['Bonjour, le monde!', 'No. 24/7']", "Bonjour le monde No 247"),
    ("\t deux  mots\u2003ici\n", "deux mots ici"),
    ("Ünïcödé ß ø", "Ünïcödé"),
    ("第1章: The End", "第1章TheEnd"),
    ("龥 a", "龥a"),
    ("龦 a", "a"),
    ("ひらがな only", "only"),
    ("", ""),
])  # fmt: skip
def test_text_is_reduced_to_letters_digits_and_chinese(text, expected):
    assert oneig.preprocess_string(text) == expected
    assert oneig.preprocess_string(expected) == expected


def test_what_the_ocr_judge_makes_up_is_taken_out():
    texts = ["addCriterion\nHello", "No text recognized.", "No text recognized", "addaddCriterionCriterion"]
    assert oneig.clean_and_remove_hallucinations(texts) == ["\nHello", "", "No text recognized", "addCriterion"]
    assert oneig.clean_and_remove_hallucinations(["No text addCriterionrecognized."]) == [""]
    beside_a_break = ["a\naddaddCriterionCriterion", "addaddCriterionCriterion\nb"]
    assert oneig.clean_and_remove_hallucinations(beside_a_break) == ["a", "b"]
    assert oneig.clean_and_remove_hallucinations([]) == []


def edits_by_table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_edit_distance_equals_the_table():
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choices("ab中é", k=rng.randint(0, 14))) for _ in range(2))
        assert oneig.levenshtein_distance(a, b) == edits_by_table(a, b) == oneig.levenshtein_distance(b, a)
    a, b = ("".join(rng.choices("abc ", k=n)) for n in (150, 131))  # beyond one machine word
    assert oneig.levenshtein_distance(a, b) == edits_by_table(a, b)


def test_words_match_as_often_as_they_occur():
    assert oneig.calculate_char_match_ratio("a a b", "a b b c") == (2, 2 / 3, 3)
    assert oneig.calculate_char_match_ratio("Word", "word") == (0, 0.0, 1)
    assert oneig.calculate_char_match_ratio("", "a") == (0, 0.0, 0)
    assert oneig.calculate_char_match_ratio("中中文a", "文中b") == (2, 0.5, 4)


@pytest.mark.parametrize("words, tokens", [(0, 128), (60, 128), (61, 256)])
def test_long_texts_get_more_tokens(words, tokens):
    assert oneig.max_new_tokens(" ".join(["w"] * words)) == tokens


def test_the_text_score_pools_all_tiles():
    summary = oneig.summarise_text(
        {"0": "one two", "1": "three"}, {"0": ["one two", "one"], "1": ["No text recognized."]}
    )
    assert summary["ED"] == (0 + 4 + 5) / 3 and summary["CR"] == 1 / 3 and summary["WAC"] == 3 / 5
    assert summary["score"] == pytest.approx(1 - 3 * (2 / 3) * (2 / 5) / 100)
    assert summary["prompts"] == {"0": [2.0, 0.5, 0.75], "1": [5.0, 0.0, 0.0]}


def test_the_edit_distance_is_capped_by_language():
    contents, ocr = {"0": "x" * 300}, {"0": ["y"]}
    assert oneig.summarise_text(contents, ocr)["score"] == 0
    contents = {"0": "x" * 75}
    assert oneig.summarise_text(contents, ocr, "EN")["score"] == pytest.approx(0.25)
    assert oneig.summarise_text(contents, ocr, "ZH")["score"] == 0
    with pytest.raises(ValueError, match="'FR' must be one of EN, ZH"):
        oneig.summarise_text(contents, ocr, "FR")


def test_a_picture_of_black_tiles_repeats_the_texts_before_it_officially_only():
    contents = {"0": "one", "1": "two", "2": "six", "3": "ten"}
    ocr = {"0": ["one"], "1": None, "2": [], "3": ["ten"]}
    official, fixed = oneig.summarise_text(contents, ocr), oneig.summarise_text(contents, ocr, mode="fixed")
    assert official["prompts"]["2"] == [edits_by_table("one", "six"), 0, 0] and official["scored"] == 3
    assert fixed["prompts"]["2"] is None and fixed["failed"] == ["1", "2"] and fixed["score"] == 1
    with pytest.raises(ValueError, match="none before it was read"):
        oneig.summarise_text({"0": "one"}, {"0": []})
    with pytest.raises(ValueError, match="has a text to compare"):
        oneig.summarise_text({"0": "one"}, {"0": []}, mode="fixed")


def test_texts_without_ids_are_taken_in_order():
    listed = oneig.summarise_text(["one", "two"], [["one"], ["too"]])
    named = oneig.summarise_text({"a": "one", "b": "two"}, {"b": ["too"], "a": ["one"]})
    assert listed["score"] == named["score"] and list(listed["prompts"]) == [0, 1]


def unit(rng, *shape):
    values = rng.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_style_takes_the_best_reference_of_each_encoder():
    csd, se = np.eye(3)[[0]], np.eye(4)[[1]]
    assert oneig.style_score(csd, se, np.eye(3), 0.5 * np.eye(4)) == pytest.approx(0.75)
    assert oneig.style_score(csd, se, -np.eye(3)[:1], -np.eye(4)[1:2]) == 0  # none below 0
    assert oneig.style_score(csd[0], se[0], np.eye(3), np.eye(4)) == 1
    two = oneig.style_score(np.eye(3)[:2], np.eye(4)[:2], np.eye(3)[:1], np.eye(4)[:1])
    assert two == pytest.approx((1 + 0) / 2)
    assert oneig.style_score([], [], np.eye(3), np.eye(4)) is None


def test_style_embeddings_must_fit_their_references():
    with pytest.raises(ValueError, match="one row per tile"):
        oneig.style_score(np.eye(3)[:2], np.eye(4)[:1], np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="width of their references"):
        oneig.style_score(np.eye(3)[:1], np.eye(4)[:1], np.eye(4), np.eye(4))


def test_style_equals_the_products_of_torch_in_both_types():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for _ in range(20):
        csd, se, csd_refs, se_refs = (
            torch.from_numpy(unit(rng, n, width)) for n, width in ((2, 768), (2, 1280), (3, 768), (3, 1280))
        )
        for dtype in (torch.float32, torch.bfloat16):
            left, right = se.to(dtype), se_refs.to(dtype)
            tiles = [
                (max((csd[i] @ csd_refs.T).max().item(), 0) + max((left[i] @ right.T).max().item(), 0)) / 2
                for i in range(2)
            ]
            assert oneig.style_score(csd, left, csd_refs, right) == pytest.approx(np.mean(tiles), abs=1e-6)


def test_style_means_are_over_prompts_that_ask_for_one():
    styles = {"0": "Baroque", "1": "line art", "2": "", "3": float("nan"), "4": None, "5": "Baroque", "6": "LEGO"}
    scores = {"0": 0.5, "1": 0.1, "2": 0.9, "3": 0.9, "4": 0.9, "5": 0.7, "6": None}
    summary = oneig.summarise_style(styles, scores)
    assert summary["score"] == pytest.approx(1.3 / 3) and summary["failed"] == ["6"]
    assert summary["styles"] == pytest.approx({"baroque": 0.6, "line_art": 0.1})
    assert oneig.summarise_style(["Baroque", "", "Pixar"], [0.5, 0.1, 0.7])["score"] == pytest.approx(0.6)
    with pytest.raises(ValueError, match="'vaporwave' is not one of abstract_expressionism"):
        oneig.summarise_style({"0": "vaporwave"}, {"0": 1.0})
    with pytest.raises(ValueError, match=r"\['9'\].*style\.csv"):
        oneig.summarise_style(styles, {"9": 1.0})


def test_diversity_is_the_mean_of_pairs_and_needs_two_tiles():
    assert oneig.diversity_score([0.1, 0.2, 0.6]) == pytest.approx(0.3)
    assert oneig.diversity_score([]) is None
    summary = oneig.summarise_diversity({"anime_000": 0.2, "anime_001": 0.4, "text_000": 0.9, "human_0": None},
                                        ["human", "anime", "text"])  # fmt: skip
    assert summary["score"] == pytest.approx(0.5)
    assert list(summary["classes"].items()) == [("human", None), ("anime", pytest.approx(0.3)), ("text", 0.9)]
    named = oneig.summarise_diversity({"a": 0.2, "b": 0.6}, {"a": "anime", "b": "text"})
    assert named["classes"] == {"anime": 0.2, "text": 0.6}


def test_reasoning_leaves_out_tiles_without_a_similarity():
    assert oneig.reasoning_score([0.2, None, 0.4]) == pytest.approx(0.3)
    assert oneig.reasoning_score([]) is None and oneig.reasoning_score(None) is None
    assert oneig.reasoning_score([None]) is None
    assert oneig.summarise_reasoning({"0": 0.2, "1": None, "2": 0.0})["score"] == pytest.approx(0.1)


@pytest.mark.parametrize("summarise", [oneig.summarise_alignment, oneig.summarise_reasoning, oneig.summarise_diversity])
@pytest.mark.parametrize("scores", [{}, {"a_0": None}, [], [None, float("nan")]])
def test_nothing_to_average_is_refused(summarise, scores):
    with pytest.raises(ValueError, match="prompts has a score"):
        summarise(scores)


def test_overall_is_the_mean_of_five_dimensions():
    five = {"alignment": 0.1, "text": {"score": 0.2}, "reasoning": 0.3, "style": 0.4, "diversity": 0.5}
    assert oneig.overall(five) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="must be alignment, text, reasoning, style, diversity"):
        oneig.overall({**five, "beauty": 1.0})


def pandas_csv(index, columns, values):
    return pd.DataFrame(values, index=index, columns=columns, dtype=object).to_csv()


def test_official_files_are_the_bytes_that_pandas_writes():
    rng = random.Random(0)
    scores = {f"{c}_{i:03d}": rng.random() if i else None for c in ("human", "anime") for i in range(4)}
    order = sorted(scores)
    alignment = oneig.summarise_alignment(scores)
    files = oneig.official_files("alignment", alignment, "my model, 2")
    assert files["alignment_score_EN.csv"] == pandas_csv(["my model, 2"], ["alignment"], [[alignment["score"]]])
    assert files["alignment_prompt_score_EN.csv"] == pandas_csv(order, ["my model, 2"], [[scores[k]] for k in order])
    diversity = oneig.summarise_diversity(scores, ["anime", "human", "text"])
    files = oneig.official_files("diversity", diversity, "m", "ZH")
    row = [*diversity["classes"].values(), diversity["score"]]
    assert files["diversity_score_ZH.csv"] == pandas_csv(["m"], ["anime", "human", "text", "total average"], [row])
    present = [k for k in order if scores[k] is not None]  # the diversity script writes no row for the others
    assert files["diversity_prompt_score_ZH.csv"] == pandas_csv(present, ["m"], [[scores[k]] for k in present])
    text = oneig.summarise_text({"001": "one", "000": "two", "2": "x"}, {"001": ["one"], "000": ["no", "too"]})
    files = oneig.official_files("text", text, "m")
    row = [text["ED"], text["CR"], text["WAC"], text["score"]]
    assert files["text_score_EN.csv"] == pandas_csv(["m"], ["ED", "CR", "WAC", "text score"], [row])
    prompts = pd.DataFrame({"m": pd.Series(text["prompts"])})
    assert files["text_prompt_score_EN.csv"] == prompts.to_csv()
    style = oneig.summarise_style({"049": "fauvism", "000": ""}, {"049": 0.5, "000": 0.1})
    files = oneig.official_files("style", style, "m")
    row = [0.5 if s == "fauvism" else None for s in oneig.STYLES]
    assert files["style_style_score_EN.csv"] == pandas_csv(["m"], oneig.STYLES, [row])
    assert sorted(files) == ["style_prompt_score_EN.csv", "style_score_EN.csv", "style_style_score_EN.csv"]
    assert files["style_prompt_score_EN.csv"] == ",m\n049,0.5\n"
    with pytest.raises(ValueError, match="dimension 'beauty'"):
        oneig.official_files("beauty", style, "m")
    with pytest.raises(ValueError, match="'EN' or 'ZH'"):
        oneig.official_files("style", style, "m", "FR")


def test_official_prompt_scores_come_back(tmp_path):
    path = tmp_path / "text_prompt_score_EN.csv"
    text = oneig.summarise_text({"001": "one", "000": "two"}, {"001": ["one"]})
    path.write_text(oneig.official_files("text", text, "m")[path.name])
    assert read_prompt_scores(path) == {"001": [0.0, 1.0, 1.0], "000": None}
    path.write_text(",a,b\nanime_000,0.5,\nanime_001,0.25,1\n")
    assert read_prompt_scores(path, "a") == {"anime_000": 0.5, "anime_001": 0.25}
    assert read_prompt_scores(path, "b") == {"anime_000": None, "anime_001": 1}
    with pytest.raises(ValueError, match="choose one of a, b"):
        read_prompt_scores(path)
    with pytest.raises(ValueError, match="no model 'c'; it has a, b"):
        read_prompt_scores(path, "c")
    path.write_text(",a\nanime_000,half\n")
    with pytest.raises(ValueError, match="line 2"):
        read_prompt_scores(path)
    with pytest.raises(ValueError, match="not a file"):
        read_prompt_scores(tmp_path / "absent.csv")


def test_official_scores_of_dimensions_come_back(tmp_path):
    path = tmp_path / "style_style_score_EN.csv"
    style = oneig.summarise_style({"049": "fauvism"}, {"049": 0.5})
    path.write_text(oneig.official_files("style", style, "m")[path.name])
    assert read_scores(path) == {"m": {name: 0.5 if name == "fauvism" else None for name in oneig.STYLES}}
    path.write_text(",alignment\na,0.5\nb,0.25\n")
    assert read_scores(path) == {"a": {"alignment": 0.5}, "b": {"alignment": 0.25}}
    for content, message in (
        (",alignment\na,half\n", "line 2: 'a,half'"),
        (",alignment\na\n", "line 2"),
        ("", "no scores"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_scores(path)
    with pytest.raises(ValueError, match="not a file"):
        read_scores(tmp_path / "absent.csv")


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_the_order_of_prompts_moves_no_mean(mode):
    rng = random.Random(0)
    scores = {f"anime_{i}": rng.random() for i in range(50)}
    shuffled = dict(rng.sample(list(scores.items()), 50))
    assert oneig.summarise_alignment(shuffled)["score"] == oneig.summarise_alignment(scores)["score"]
    contents = {str(i): "".join(rng.choices("ab ", k=9)) + "x" for i in range(20)}
    ocr = {k: ["".join(rng.choices("ab ", k=9)) for _ in range(4)] for k in contents}
    results = [oneig.summarise_text(dict(c), ocr, mode=mode) for c in (contents.items(), reversed(contents.items()))]
    assert results[0]["score"] == results[1]["score"] and results[0]["prompts"] == results[1]["prompts"]
