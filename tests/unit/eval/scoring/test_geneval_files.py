"""GenEval's files are what the official scripts (pandas) write and read."""

import io
import json
import random

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval.geneval import (
    box_iou,
    crop_object,
    filter_detections,
    judge_image,
    load_prompts,
    read_results,
    result_row,
    summarise,
    summary_text,
    walk_layout,
    write_results,
)

TEXTS = ["a photo of a dog", "日本語 / ñandú", '😀 \u2028 \x7f \\ "q" \t', "<b>&'\x85"]


def rows(seed=0, number=40):
    rng = random.Random(seed)
    made = []
    for i in range(number):
        metadata = {"tag": rng.choice(["colors", "position", "counting"]), "prompt": rng.choice(TEXTS), "include": []}
        made.append(
            {
                "filename": f"out/0000{i % 7}/samples/{i:04d}.png",
                "tag": metadata["tag"],
                "prompt": metadata["prompt"],
                "correct": rng.random() < 0.6,
                "reason": rng.choice(["", "expected dog>=1, found 0\nexpected cat<2, found 3"]),
                "metadata": json.dumps(metadata),
                "details": json.dumps({"dog": [[0.1, 2.5, 3.0, 4.0, 0.9]]}),
            }
        )
    return made


def test_results_are_the_bytes_that_pandas_writes(tmp_path):
    write_results(tmp_path / "results.jsonl", rows())
    with io.StringIO() as official:
        pd.DataFrame(rows()).to_json(official, orient="records", lines=True)
        assert (tmp_path / "results.jsonl").read_text(encoding="ascii") == official.getvalue()


def test_results_come_back_and_are_written_again_unchanged(tmp_path):
    write_results(tmp_path / "a", rows())
    assert read_results(tmp_path / "a") == rows()
    write_results(tmp_path / "b", read_results(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name not in ("a", "b")]


def test_metadata_and_details_may_be_given_as_values(tmp_path):
    given = [{**r, "metadata": json.loads(r["metadata"]), "details": json.loads(r["details"])} for r in rows()]
    write_results(tmp_path / "a", given)
    assert read_results(tmp_path / "a") == rows()


def test_a_failed_write_leaves_the_old_results(tmp_path):
    write_results(tmp_path / "a", rows())
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="row 2 has no 'reason'"):
        write_results(tmp_path / "a", [rows()[0], {k: v for k, v in rows()[1].items() if k != "reason"}])
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("line, message", [("{not json", "line 2: not JSON"), ('{"tag": "colors"}', "line 2.*'correct'"),
                                           ('{"tag": "a", "correct": 2, "metadata": "{}"}', "true or false")])  # fmt: skip
def test_a_broken_results_line_is_named(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    write_results(path, rows()[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_results(path)


def by_pandas(table):
    """The official summary's definition, in pandas."""
    df = pd.DataFrame(table)
    out = ["Summary", "=======", f"Total images: {len(df)}", f"Total prompts: {len(df.groupby('metadata'))}"]
    out.append(f"% correct images: {df['correct'].mean():.2%}")
    out.append(f"% correct prompts: {df.groupby('metadata')['correct'].any().mean():.2%}")
    out += ["", "Task breakdown", "=============="]
    means = []
    for tag, group in df.groupby("tag", sort=False):
        means.append(group["correct"].mean())
        out.append(f"{tag:<16} = {means[-1]:.2%} ({group['correct'].sum()} / {len(group)})")
    return "\n".join([*out, "", f"Overall score (avg. over tasks): {np.mean(means):.5f}"]) + "\n"


@pytest.mark.parametrize("seed", range(8))
def test_the_summary_text_is_the_official_one(seed):
    table = rows(seed, 10 + 37 * seed)
    assert summary_text(table) == by_pandas(table)


def test_the_order_of_rows_moves_the_order_of_tasks_only():
    table = rows(3, 60)
    shuffled = random.Random(1).sample(table, len(table))
    assert summarise(shuffled) == summarise(table)
    assert sorted(summary_text(shuffled).splitlines()) == sorted(summary_text(table).splitlines())
    with pytest.raises(ValueError, match="no judged images"):
        summary_text([])


def test_equal_metadata_as_text_or_as_a_value_is_one_prompt():
    metadata = {"tag": "colors", "prompt": "ñ", "include": []}
    table = [{"tag": "colors", "correct": True, "metadata": metadata},
             {"tag": "colors", "correct": False, "metadata": json.dumps(metadata)}]  # fmt: skip
    assert summarise(table)["prompts"] == 1 and "Total prompts: 1\n" in summary_text(table)


def test_a_result_row_lists_the_boxes_that_were_kept():
    metadata = {"tag": "counting", "prompt": "two dogs", "include": [{"class": "dog", "count": 2}]}
    objects = {"dog": [[0, 0, 9, 9, 0.95], [20, 0, 29, 9, 0.5]], "cat": [[0, 0, 9, 9, 0.5]]}
    row = result_row("x.png", objects, metadata, judge_image(objects, metadata))
    assert json.loads(row["details"]) == {"dog": [[0, 0, 9, 9, 0.95]]}
    assert row["correct"] is False and row["reason"] == "expected dog>=2, found 1"
    assert json.loads(row["metadata"]) == metadata


def test_a_side_of_a_box_counts_its_last_pixel():
    assert box_iou([0, 0, 9, 9], [0, 0, 9, 9]) == 1
    assert box_iou([0, 0, 9, 9], [5, 0, 14, 9]) == pytest.approx(50 / 150)
    assert box_iou([0, 0, 9, 9], [9, 9, 18, 18]) == pytest.approx(1 / 199)
    assert box_iou([0, 0, 9, 9], [11, 0, 14, 9]) == 0
    assert box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == 1
    assert box_iou([5, 5, 4, 4], [5, 5, 4, 4]) == 0  # no area at all


def iou_by_pixels(a, b):
    cells = [{(x, y) for x in range(i[0], i[2] + 1) for y in range(i[1], i[3] + 1)} for i in (a, b)]
    return len(cells[0] & cells[1]) / max(1, len(cells[0] | cells[1]))


def test_overlap_equals_counting_the_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (sorted(rng.integers(0, 8, 2)) + sorted(rng.integers(0, 8, 2)) for _ in range(2))
        a, b = ([int(box[0]), int(box[2]), int(box[1]), int(box[3])] for box in (a, b))
        assert box_iou(a, b) == pytest.approx(iou_by_pixels(a, b)) == box_iou(b, a)


def test_an_overlapping_detection_is_dropped_for_a_better_one_that_stays():
    chain = [[0, 0, 9, 9, 0.9], [5, 0, 14, 9, 0.8], [10, 0, 19, 9, 0.7]]  # 1 overlaps both, 0 and 2 do not
    assert len(filter_detections(chain)) == 3
    assert [d["box"][0] for d in filter_detections(chain, max_overlap=0.3)] == [0, 10]
    assert len(filter_detections(chain, max_overlap=0.34)) == 3
    equal = [[0, 0, 9, 9, 0.9], [0, 5, 9, 14, 0.8]]
    assert len(filter_detections(equal, max_overlap=box_iou(equal[0], equal[1]))) == 1  # at the limit: dropped
    assert len(filter_detections([[0, 0, 9, 9, 0.9]] * 2, max_overlap=0.99)) == 1


def test_objects_are_limited_before_overlaps_are_dropped():
    boxes = [[0, 0, 9, 9, 0.9], [0, 0, 9, 9, 0.8], [50, 0, 59, 9, 0.7]]
    assert len(filter_detections(boxes, max_objects=2, max_overlap=0.5)) == 1


def test_the_overlap_setting_reaches_the_verdict():
    metadata = {"tag": "two_object", "include": [{"class": "dog", "count": 2}], "prompt": "p"}
    objects = {"dog": [[0, 0, 9, 9, 0.9], [0, 0, 9, 9, 0.8]]}
    assert judge_image(objects, metadata)["correct"] is True
    assert judge_image(objects, metadata, max_overlap=0.9)["reason"] == "expected dog>=2, found 1"


def picture():
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_a_crop_is_grey_outside_the_mask():
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = True
    crop = np.asarray(crop_object(picture(), (0.4, 1.4, 2.6, 3), mask))
    assert crop.shape == (2, 3, 3)
    assert (crop[0, 1] == np.asarray(picture())[1, 1]).all()
    assert (np.delete(crop.reshape(-1, 3), 1, axis=0) == 0x99).all()


def test_a_crop_can_keep_background_and_size():
    mask = np.zeros((4, 4), bool)
    assert (
        crop_object(picture(), (0, 0, 2, 2), mask, background="original", crop=False).tobytes() == picture().tobytes()
    )
    assert crop_object(picture(), (1, 1, 3, 3)).tobytes() == picture().crop((1, 1, 3, 3)).tobytes()
    assert crop_object(picture().convert("L"), (0, 0, 2, 2)).mode == "RGB"
    with pytest.raises(ValueError, match=r"\(height, width\)"):
        crop_object(picture(), (0, 0, 2, 2), np.zeros((3, 4), bool))


def test_a_prompt_file_may_hold_line_separators_inside_its_strings(tmp_path):
    prompts = [{"tag": "colors", "include": [], "prompt": text} for text in TEXTS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts), encoding="utf-8")
    assert load_prompts(path) == prompts
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(path)


def test_a_broken_metadata_file_is_named(tmp_path):
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"tag": ')
    with pytest.raises(ValueError, match="00000.*metadata.jsonl is not a JSON object"):
        walk_layout(tmp_path)
