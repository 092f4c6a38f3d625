"""Folders of images with missing and extra files, and prompts of any Unicode text, through the files of the benchmarks."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import dpg, geneval
from eval.judging.protocols import with_ids

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Any text that UTF-8 can write: right to left, combining characters, line separators, controls, quotes, emoji.
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
samples = st.sampled_from(["0000.png", "0001.png", "0002.png"])
# Ignored by the official code, too: other names, and names that do not begin with digits and ".png".
extras = st.sampled_from(["grid.png", "0000.jpg", "0000.webp", ".DS_Store", "a0000.png", "0000_png", "thumbs/0000.png"])


@SETTINGS
@given(st.lists(st.tuples(texts, st.sets(samples), st.sets(extras)), min_size=1, max_size=4), st.booleans())
def test_a_folder_gives_its_images_whatever_else_is_there_and_a_missing_one_is_an_error(drawn, without_empty):
    prompts = [{"tag": "colors", "include": [], "prompt": text} for text, _, _ in drawn]
    with tempfile.TemporaryDirectory() as place:
        root, expected = Path(place), []
        for name in ("notes", "grids", "0x1"):
            (root / name).mkdir()
        (root / "00007").write_text("a file, not a folder")
        for i, (_, images, others) in enumerate(drawn):
            if without_empty and not images:
                continue
            folder = root / f"{i:05d}"
            (folder / "samples").mkdir(parents=True)
            (folder / "metadata.jsonl").write_text(json.dumps(prompts[i], ensure_ascii=False), encoding="utf-8")
            for name in sorted({*images, *others}):
                (folder / "samples" / name).parent.mkdir(exist_ok=True)
                (folder / "samples" / name).write_bytes(b"")
            expected += [(f"{i:05d}", name) for name in sorted(images)]
        if not expected:
            with pytest.raises(ValueError, match="to score|lacks|images, not"):
                geneval.walk_layout(root, prompts, 3, "official")
            return
        walked = geneval.walk_layout(root, prompts, 3, "official")
        assert [(one["folder"], one["path"].name) for one in walked] == expected
        assert all(one["metadata"] == prompts[int(one["folder"])] for one in walked)
        if len(expected) == 3 * len(drawn):
            assert geneval.walk_layout(root, prompts, 3) == walked
        else:
            with pytest.raises(ValueError, match=r"lacks \d of|images, not 3"):
                geneval.walk_layout(root, prompts, 3)


@SETTINGS
@given(st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4))
def test_results_of_any_text_come_back_and_are_written_again_as_the_same_bytes(drawn):
    rows = [
        {"filename": name, "tag": "colors", "prompt": name, "correct": right, "reason": reason,
         "metadata": {"prompt": name}, "details": {reason: [[0.0, 0.0, 1.0, 1.0, 0.5]]}}
        for name, reason, right in drawn
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        path, again = Path(place, "a.jsonl"), Path(place, "b.jsonl")
        geneval.write_results(path, rows)
        read = geneval.read_results(path)
        assert [(r["filename"], r["reason"], r["correct"]) for r in read] == [
            (n, why, right) for n, why, right in drawn
        ]
        assert [json.loads(r["metadata"]) for r in read] == [row["metadata"] for row in rows]
        geneval.write_results(again, read)
        assert again.read_bytes() == path.read_bytes()
        assert geneval.summarise(read) == geneval.summarise(rows)


# A carriage return or NUL is not kept by every writer of CSV, and an item's id is a file's name.
fields = texts.map(lambda text: text.replace("\r", " ").replace("\0", " ")).filter(lambda text: text.strip())


@SETTINGS
@given(st.lists(fields, min_size=1, max_size=4), fields, st.randoms(use_true_random=False))
def test_questions_of_any_text_are_read_in_order_and_a_cut_table_is_refused(questions, prompt, random):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(
        "item_id text keywords proposition_id dependency category_broad category_detailed tuple question_natural_language".split()
    )
    for i, question in enumerate(questions, start=1):
        writer.writerow(["item", prompt, "", i, i - 1, "entity", "whole", "entity - whole (x)", question])
    whole = buffer.getvalue()
    (group,) = dpg.load_questions(io.StringIO(whole, newline=""), "fixed").values()
    assert group["qid2question"] == dict(enumerate(questions, start=1))
    assert group["qid2dependency"] == {i: [i - 1] for i in range(1, len(questions) + 1)}
    begin = whole.rindex("item,")  # inside the last row, before its last field
    cut = whole[: random.randrange(begin + 5, whole.rindex("entity - whole (x)"))]
    with pytest.raises(ValueError, match="line"):
        dpg.load_questions(io.StringIO(cut, newline=""), "fixed")


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from("ab"), texts), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_ids_of_prompts_do_not_depend_on_their_order_and_equal_prompts_have_different_ones(drawn, random):
    prompts = [{"tag": tag, "prompt": text} for tag, text in drawn]
    ids = [prompt["id"] for prompt in with_ids(prompts)]
    assert len(set(ids)) == len(ids) and all(name.isascii() and "/" not in name for name in ids)
    mixed = random.sample(prompts, len(prompts))
    assert sorted((p["tag"], p["prompt"], p["id"]) for p in with_ids(mixed)) == sorted((p["tag"], p["prompt"], i) for p, i in zip(prompts, ids, strict=True))  # fmt: skip
