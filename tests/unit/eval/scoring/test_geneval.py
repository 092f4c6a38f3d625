"""GenEval's rule, message for message. Expected positions are from the official code."""

import json

import numpy as np
import pytest

from eval.geneval import (
    expected_images,
    filter_detections,
    judge_image,
    kept_detections,
    load_prompts,
    relative_position,
    summarise,
    walk_layout,
)

# box A, box B, threshold, where A is relative to B
POSITIONS = [
    ((300, 100, 400, 200), (100, 100, 200, 200), 0.1, ["right of"]),
    ((-100, 100, 0, 200), (100, 100, 200, 200), 0.1, ["left of"]),
    ((100, -100, 200, 0), (100, 100, 200, 200), 0.1, ["above"]),
    ((100, 300, 200, 400), (100, 100, 200, 200), 0.1, ["below"]),
    ((300, 300, 400, 400), (100, 100, 200, 200), 0.1, ["below", "right of"]),  # 45 deg: both
    ((220, 100, 320, 200), (100, 100, 200, 200), 0.1, ["right of"]),
    ((119, 100, 219, 200), (100, 100, 200, 200), 0.1, []),  # offset 19 < 0.1*(100+100)=20 -> none
    ((120, 100, 220, 200), (100, 100, 200, 200), 0.1, []),  # exactly 20 -> revised 0 -> none
    ((139, 100, 239, 200), (100, 100, 200, 200), 0.1, []),  # offset 39: (39-20)/39 = .487 < .5 -> none
    ((140, 100, 240, 200), (100, 100, 200, 200), 0.1, []),  # (40-20)/40 = .5 exactly, strict > -> none
    ((141, 100, 241, 200), (100, 100, 200, 200), 0.1, ["right of"]),
    ((300, 180, 400, 280), (100, 100, 200, 200), 0.1, ["right of"]),  # dx 200 dy 80
    ((300, 260, 400, 360), (100, 100, 200, 200), 0.1, ["below", "right of"]),  # dx 200 dy 160
    ((130, 160, 180, 300), (100, 100, 200, 200), 0.1, ["below"]),  # rectangle a, dims 50x140
    ((300, 230, 310, 240), (100, 100, 200, 200), 0.1, ["right of"]),  # small a
    ((100, 100, 200, 200), (100, 100, 200, 200), 0.1, []),  # identical boxes
    ((141, 100, 241, 200), (100, 100, 200, 200), 0.0, ["right of"]),
    ((150, 100, 250, 200), (100, 100, 200, 200), 0.3, []),
    ((100, 190, 200, 240), (100, 100, 200, 200), 0.1, ["below"]),  # touching below
    ((200, 100, 100, 200), (300, 100, 400, 200), 0.1, ["left of"]),  # dim uses abs(): inverted box
]


@pytest.mark.parametrize(("a", "b", "threshold", "expect"), POSITIONS)
def test_positions_are_the_official_ones(a, b, threshold, expect):
    assert relative_position(a, b, threshold) == expect


def test_a_box_of_three_numbers_is_refused():
    with pytest.raises(ValueError, match="x0, y0, x1, y1"):
        relative_position((1, 2, 3), (0, 0, 1, 1))


def box(x, y=0, score=0.95, **more):
    return {"box": [x, y, x + 10, y + 10], "score": score, **more}


def ask(*include, tag="two_object", exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


def judged(objects, metadata, **options):
    verdict = judge_image(objects, metadata, **options)
    return verdict["correct"], verdict["reason"]


def test_too_few_objects_are_wrong_and_counted_in_the_reason():
    metadata = ask({"class": "dog", "count": 2}, {"class": "cat", "count": 1})
    assert judged({"dog": [box(0)]}, metadata) == (False, "expected dog>=2, found 1\nexpected cat>=1, found 0")
    assert judged({"dog": [box(0), box(20)], "cat": [box(40)]}, metadata) == (True, "")


def test_more_objects_than_asked_for_are_wrong_with_an_exclude_only():
    three = {"dog": [box(0), box(20), box(40)]}
    two = {"class": "dog", "count": 2}
    assert judged(three, ask(two)) == (True, "")
    wrong = judged(three, ask(two, exclude=[{"class": "dog", "count": 3}]))
    assert wrong == (False, "expected dog<3, found 3")


def test_a_wrong_color_lists_the_colors_found_in_the_official_order():
    metadata = ask({"class": "car", "count": 1, "color": "red"})
    assert judged({"car": [box(0, color="blue")]}, metadata) == (False, "expected red car>=1, found 0 red; and 1 blue")
    metadata = ask({"class": "car", "count": 3, "color": "red"})
    cars = [box(0, color="teal"), box(20, color="black"), box(40, color="red")]
    assert judged({"car": cars}, metadata)[1] == "expected red car>=3, found 1 red; and 1 red, 1 black, 1 teal"


def test_only_the_best_objects_are_looked_at():
    cars = [box(0, score=0.5, color="red"), box(20, score=0.8, color="blue")]
    assert judged({"car": cars}, ask({"class": "car", "count": 1, "color": "red"}))[0] is False
    assert judged({"car": cars}, ask({"class": "car", "count": 1, "color": "blue"}))[0] is True


def test_colors_can_come_from_a_classifier_of_the_objects_looked_at():
    seen = []

    def classify(name, result):
        seen.append((name, len(result)))
        return ["red"] * len(result)

    metadata = ask({"class": "car", "count": 1, "color": "red"})
    assert judged({"car": [box(0), box(20)]}, metadata, classify_colors=classify) == (True, "")
    assert seen == [("car", 1)]
    with pytest.raises(ValueError, match="no 'color'"):
        judge_image({"car": [box(0)]}, metadata)


POSITION = ask({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}, tag="position")


def test_a_position_without_its_target_says_so():
    reason = "expected cat>=1, found 0\nno target for dog to be right of"
    assert judged({"dog": [box(50)]}, POSITION) == (False, reason)


def test_a_wrong_position_tells_what_was_found():
    assert judged({"cat": [box(0)], "dog": [box(50)]}, POSITION) == (True, "")
    reason = judged({"cat": [box(50)], "dog": [box(0)]}, POSITION)[1]
    assert reason == "expected dog right of target, found left of target"
    reason = judged({"cat": [box(0)], "dog": [box(0)]}, POSITION)[1]
    assert reason == "expected dog right of target, found  target"
    below_left = {"cat": [box(50)], "dog": [box(0, 50)]}
    assert judged(below_left, POSITION)[1] == "expected dog right of target, found below and left of target"


def test_a_position_must_hold_for_every_pair():
    metadata = ask({"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]})
    assert judged({"cat": [box(0), box(20)], "dog": [box(60)]}, metadata)[0] is True
    assert judged({"cat": [box(0), box(90)], "dog": [box(60)]}, metadata)[0] is False


def test_a_wrongly_colored_object_is_no_target_and_its_position_is_not_looked_at():
    metadata = ask(
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]},
    )
    dog_too = judged({"cat": [box(0, color="blue")], "dog": [box(50, color="blue")]}, metadata)[1]
    assert dog_too.splitlines()[1] == "expected red dog>=1, found 0 red; and 1 blue"
    dog_right = judged({"cat": [box(0, color="blue")], "dog": [box(50, color="red")]}, metadata)[1]
    assert dog_right.splitlines()[1] == "no target for dog to be right of"


def test_a_position_may_only_refer_to_an_earlier_clause():
    metadata = ask({"class": "dog", "count": 1, "position": ["right of", 0]})
    with pytest.raises(ValueError, match="0 earlier clauses"):
        judge_image({"dog": [box(0)]}, metadata)


def test_scores_must_lie_strictly_above_the_threshold_in_float32():
    one = ask({"class": "dog", "count": 1}, tag="single_object")
    # 0.3 + 1e-9 is 0.3 in float32
    for score, right in ((0.3, False), (0.3 + 1e-9, False), (np.nextafter(np.float32(0.3), np.float32(1)), True)):
        assert judge_image({"dog": [box(0, score=score)]}, one)["correct"] is right
    counting = ask({"class": "dog", "count": 1}, tag="counting")
    for score, right in ((0.5, False), (0.9, False), (0.9 + 1e-9, False), (0.901, True)):
        assert judge_image({"dog": [box(0, score=score)]}, counting)["correct"] is right


def test_sixteen_detections_of_a_class_are_kept_highest_first():
    result = filter_detections([box(i, score=0.5 + i / 100) for i in range(20)])
    assert [d["box"][0] for d in result] == list(range(19, 3, -1))
    assert filter_detections(result) == result


def test_ties_come_out_in_the_official_order_and_filtered_lists_are_judged_as_they_are():
    ties = [box(0, score=0.8), box(1, score=0.8), box(2, score=0.5)]
    assert [d["box"][0] for d in filter_detections(ties)] == [1, 0, 2]
    assert [d["box"][0] for d in filter_detections(ties[::-1])] == [0, 1, 2]
    assert [d["box"][0] for d in filter_detections([box(i, score=0.9) for i in range(20)])] == list(range(19, 3, -1))
    filtered = filter_detections(ties)
    assert kept_detections(filtered) == filtered
    metadata = ask({"class": "dog", "count": 1, "color": "red"}, tag="colors")
    colored = [{**box(0, score=0.8), "color": "red"}, {**box(1, score=0.8), "color": "blue"}]
    assert (
        judge_image({"dog": colored}, metadata)["correct"]
        and not judge_image({"dog": colored[::-1]}, metadata)["correct"]
    )


def test_bare_numbers_stand_for_box_and_score():
    metadata = ask({"class": "dog", "count": 1}, tag="single_object")
    assert judge_image({"dog": [np.array([0, 0, 9, 9, 0.4], dtype=np.float32)]}, metadata)["correct"] is True
    assert judge_image({"dog": [[0, 0, 9, 9, 0.2]]}, metadata)["correct"] is False
    assert judge_image({"dog": [(0, 0, 9, 9)]}, metadata)["correct"] is True


@pytest.mark.parametrize("objects", [{"dog": [{"score": 1}]}, {"dog": [[1, 2, 3]]}])
def test_a_malformed_detection_is_refused(objects):
    with pytest.raises(ValueError, match="box"):
        judge_image(objects, ask({"class": "dog", "count": 1}))


def rows_of(tag, *verdicts):
    return [{"tag": tag, "correct": v, "metadata": {"prompt": p}} for p, vs in verdicts for v in vs]


def test_the_overall_score_is_the_plain_mean_of_the_tasks():
    rows = rows_of("colors", ("a", [1, 1, 0, 0]), ("b", [0, 0, 0, 0])) + rows_of("position", ("c", [1, 0]))
    summary = summarise(rows)
    assert summary["overall"] == pytest.approx((2 / 8 + 1 / 2) / 2)
    assert summary["tasks"]["colors"] == {"accuracy": 0.25, "correct": 2, "images": 8, "prompts": 2}
    assert summary["image_accuracy"] == pytest.approx(3 / 10) and summary["images"] == 10
    assert summary["prompt_accuracy"] == pytest.approx(2 / 3) and summary["correct_prompts"] == 2
    assert summary["missing_tasks"] == ["single_object", "two_object", "counting", "color_attr"]
    with pytest.raises(ValueError, match="no judged images"):
        summarise([])


def lay_out(root, prompts, files):
    for index, metadata in enumerate(prompts):
        samples = root / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        for name in files:
            (samples / name).write_bytes(b"")


PROMPTS = [{"tag": "colors", "include": [], "prompt": text} for text in ("a", "b")]


def test_folders_of_digits_and_files_that_start_with_digits_and_png_count(tmp_path):
    lay_out(tmp_path, PROMPTS, ["0000.png", "0001.png.bak", "x0002.png", "0003.jpg", ".0004.png"])
    (tmp_path / "other").mkdir()
    (tmp_path / "00000_old").mkdir()
    (tmp_path / "00000" / "samples" / "0009.png").mkdir()
    result = walk_layout(tmp_path)
    assert [(f["folder"], f["path"].name) for f in result] == [
        ("00000", "0000.png"), ("00000", "0001.png.bak"), ("00001", "0000.png"), ("00001", "0001.png.bak"),
    ]  # fmt: skip
    assert result[2]["metadata"] == PROMPTS[1]


def test_missing_images_are_an_error_unless_the_official_way_is_asked_for(tmp_path):
    lay_out(tmp_path, PROMPTS, ["0000.png", "0001.png"])
    (tmp_path / "00001" / "samples" / "0001.png").unlink()
    with pytest.raises(ValueError, match="holds 1 images, not 2"):
        walk_layout(tmp_path, PROMPTS, 2)
    with pytest.raises(ValueError, match="holds 1 images, not 2"):
        walk_layout(tmp_path)
    assert len(walk_layout(tmp_path, PROMPTS, 2, missing="official")) == 3
    three = [*PROMPTS, {"tag": "colors", "include": [], "prompt": "c"}]
    with pytest.raises(ValueError, match="lacks 1 of 3 prompts"):
        walk_layout(tmp_path, three, 2)
    with pytest.raises(ValueError, match="'error' or 'official'"):
        walk_layout(tmp_path, missing="ignore")


def test_images_of_another_prompt_are_refused(tmp_path):
    lay_out(tmp_path, PROMPTS, ["0000.png"])
    with pytest.raises(ValueError, match="not prompt 0"):
        walk_layout(tmp_path, PROMPTS[::-1], 1)


def test_a_prompt_may_ask_for_more_images_than_others():
    assert expected_images({"images": 3}, 4) == 12 and expected_images({}, 4) == 4


def test_a_prompt_file_is_read_and_a_broken_line_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in PROMPTS) + "\n\n")
    assert load_prompts(path) == PROMPTS
    path.write_text(json.dumps(PROMPTS[0]) + "\n{not json\n")
    with pytest.raises(ValueError, match="line 2"):
        load_prompts(path)
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 1.*'tag'"):
        load_prompts(path)
    with pytest.raises(ValueError, match="not a file"):
        load_prompts(tmp_path / "absent.jsonl")


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize("change, message", [
    ({"include": None}, "include must be a list of objects with 'class' and 'count', not None"),
    ({"include": ["dog"]}, "include must be a list"),
    ({"include": [{"count": 1}]}, "include must be a list"),
    ({"exclude": None}, "exclude must be a list"),
    ({"include": [{"class": "dog", "color": "red"}]}, r"include\[0\] has count=None; it must be a whole number from 1"),
    ({"include": [{**DOG, "count": "1"}]}, "count='1'"),
    ({"include": [{**DOG, "count": 0}]}, "count=0"),
    ({"exclude": [{**DOG, "count": True}]}, r"exclude\[0\] has count=True"),
    ({"include": [DOG, {**DOG, "position": ["to the left of", 0]}]}, r"include\[1\] has position=.*left of, right of"),
    ({"include": [DOG, {**DOG, "position": ["left of", 1]}]}, "position"),
    ({"include": [DOG, {**DOG, "position": ["left of"]}]}, "position"),
    ({"include": [DOG, {**DOG, "position": "left of"}]}, "position"),
])  # fmt: skip
def test_a_prompt_that_could_not_be_judged_is_refused_when_it_is_read(tmp_path, change, message):
    path = tmp_path / "prompts.jsonl"
    good = {"tag": "position", "prompt": "a", "include": [DOG, {**DOG, "position": ["left of", 0]}]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        load_prompts(path)


def test_every_class_is_counted_alike_whether_the_prompt_asks_for_it_or_not():
    objects = {
        "dog": [box(20 * i, score=0.3 + i / 100) for i in range(25)],
        "cat": [box(0, score=0.2), box(20, score=0.5)],
        "cow": [box(0, score=0.3)],
    }
    for name in objects:
        result = judge_image(objects, ask({"class": name, "count": 1}, tag="two_object"))["found"]
        assert result == {"dog": 16, "cat": 1}
    assert judge_image(objects, ask(), max_overlap=0.5)["found"] == {"cat": 1, "dog": 16}
