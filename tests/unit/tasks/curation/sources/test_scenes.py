import itertools
import re

import numpy as np
import pytest

from eval.benchmarks.shapes.vocabulary import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_RELATIONS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
)
from eval.geneval import relative_position
from tasks.curation.sources.made import scenes
from tasks.curation.sources.made.scenes import GAP, KINDS, LONG_WORDS, SHORT_WORDS, Scene, SceneObject

SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
COUNTS = {"a": 1, **{word: n for n, word in NUMBERS.items()}}


def rng(*seed):
    return np.random.default_rng(list(seed))


@pytest.fixture(scope="module")
def drawn():
    """600 scenes with their captions."""
    made = []
    for i in range(600):
        generator = rng(1, i)
        scene = scenes.sample_scene(generator)
        made.append((scene, scenes.captions(scene, generator)))
    return made


def test_nothing_held_out_is_ever_shown(drawn):
    for scene, _ in drawn:
        looks = {(item.color, item.shape) for item in scene.objects}
        assert not looks & HELD_OUT_COLOR_SHAPE
        assert not any(pair <= looks for pair in HELD_OUT_COLOR_PAIRS)
        for a, b in itertools.permutations(scene.objects, 2):
            said = relative_position(scene.box_px(a), scene.box_px(b))
            ordered = ["left of"] * (a.cx < b.cx) + ["above"] * (a.cy < b.cy)
            assert not any((a.shape, r, b.shape) in HELD_OUT_RELATIONS for r in [*said, *ordered])


def test_all_that_is_not_held_out_is_shown(drawn):
    looks = {(item.color, item.shape) for scene, _ in drawn for item in scene.objects}
    assert looks == set(itertools.product(COLORS, SHAPES)) - HELD_OUT_COLOR_SHAPE
    assert {scene.background for scene, _ in drawn} == set(BACKGROUNDS)
    assert {len(scene.objects) for scene, _ in drawn} == {1, 2, 3, 4}
    assert {round(scene.width_px / scene.height_px, 1) for scene, _ in drawn} >= {1.0, 1.3, 1.5, 0.7, 1.8, 0.6}
    wanted = {(a, r, b) for a, b in itertools.permutations(SHAPES, 2) for r in RELATIONS} - HELD_OUT_RELATIONS
    said = {
        (m[1], m[2], m[3])
        for _, texts in drawn
        for m in [re.fullmatch(r"a photo of a (\w+) (left of|right of|above|below) a (\w+)", t) for t in texts]
        if m
    }
    assert said == wanted


def test_kinds_keep_their_shares(drawn):
    for kind, share in KINDS.items():
        assert abs(sum(scene.kind == kind for scene, _ in drawn) / len(drawn) - share) < 0.07


def test_objects_stay_apart_and_inside(drawn):
    for scene, _ in drawn:
        for item in scene.objects:
            left, top, right, bottom = scene.box_px(item)
            assert 0 < left and 0 < top and right < scene.width_px and bottom < scene.height_px
        for a, b in itertools.combinations(scene.objects, 2):
            reach = (a.size + b.size) / 2 + GAP - 1e-9
            assert max(abs(a.cx - b.cx), abs(a.cy - b.cy)) >= reach


NOUN = r"(?P<{p}number>a|two|three|four) (?:(?P<{p}size>small|large) )?(?:(?P<{p}color>%s) )?(?P<{p}shape>%s)" % (
    "|".join(COLORS),
    "|".join([*SINGULARS, *SHAPES]),
)
PLACE = r"(?: at the (?P<{p}place>top left|top right|bottom left|bottom right|top|bottom|left|right|center))?"
ENDING = r"(?: on a (?P<background>\w+) background)?"


def parse(text):
    """The content of a caption: (things, relation, background), by a grammar of our own, not the generator's."""
    body = text.removeprefix("a photo of ")
    match = re.fullmatch(NOUN.format(p="a") + r" (left of|right of|above|below) " + NOUN.format(p="b") + ENDING, body)
    if match:
        result = match.groupdict()
        return [_thing(result, "a"), _thing(result, "b")], match[5], result["background"]
    phrases = re.split(r" and ", body)
    things, background = [], None
    for i, phrase in enumerate(phrases):
        match = re.fullmatch((NOUN + PLACE).format(p="x") + (ENDING if i == len(phrases) - 1 else ""), phrase)
        assert match, text
        result = match.groupdict()
        background = result.get("background") or background
        things.append(_thing(result, "x"))
    return things, None, background


def _thing(result, p):
    shape = result[p + "shape"]
    return {
        "count": COUNTS[result[p + "number"]],
        "shape": SINGULARS.get(shape, shape),
        "color": result[p + "color"],
        "size": result[p + "size"],
        "place": result.get(p + "place"),
    }


def fits(scene, item, thing):
    across = ("left", "", "right")[int(3 * item.cx * scene.unit_px / scene.width_px)]
    down = ("top", "", "bottom")[int(3 * item.cy * scene.unit_px / scene.height_px)]
    return (
        item.shape == thing["shape"]
        and thing["color"] in (None, item.color)
        and thing["size"] in (None, "small" if item.size <= 0.30 else "large")
        and thing["place"] in (None, f"{down} {across}".strip() or "center")
    )


def test_every_caption_is_true_and_exact(drawn):
    relations = 0
    for scene, texts in drawn:
        for text in texts:
            things, relation, background = parse(text)
            assert background in (None, scene.background), text
            # Exact: the things said can be matched one to one with the objects shown.
            said = [thing for thing in things for _ in range(thing["count"])]
            assert len(said) == len(scene.objects), text
            assert any(
                all(fits(scene, item, thing) for item, thing in zip(order, said, strict=True))
                for order in itertools.permutations(scene.objects)
            ), (text, scene)
            if relation:
                relations += 1
                a, b = (next(item for item in scene.objects if fits(scene, item, thing)) for thing in things)
                assert relation in relative_position(scene.box_px(a), scene.box_px(b)), (text, scene)
    assert relations > 300


def test_without_a_relation_the_object_nearer_to_the_top_left_is_named_first(drawn):
    named = 0
    for scene, texts in drawn:
        for text in texts if scene.kind == "two" else []:
            things, relation, _ = parse(text)
            if relation is None:
                first, second = (next(item for item in scene.objects if fits(scene, item, thing)) for thing in things)
                across, down = second.cx - first.cx, second.cy - first.cy
                assert (across if abs(across) > abs(down) else down) > 0, (text, scene)
                named += 1
    assert named > 300


def test_captions_have_several_lengths_and_a_small_vocabulary(drawn):
    for scene, texts in drawn:
        assert 4 <= len(texts) <= 6 and len(set(texts)) == len(texts)
        words = [len(text.split()) for text in texts]
        assert min(words) <= SHORT_WORDS and max(words) == words[-1] <= LONG_WORDS and words[-1] >= 10
        assert all(re.fullmatch(r"[a-z ]+", text) for text in texts)
    assert len({word for _, texts in drawn for text in texts for word in text.split()}) < 100


def test_captions_use_the_wording_of_the_benchmark(drawn):
    said = {text for _, texts in drawn for text in texts}
    assert {f"a photo of a {shape}" for shape in SHAPES} <= said
    assert {f"a photo of {NUMBERS[n]} {PLURALS[shape]}" for n in (2, 3, 4) for shape in SHAPES} <= said
    assert "a photo of a red circle" in said and "a photo of a black cross" in said
    pair = re.compile(rf"a photo of a ({'|'.join(COLORS)}) \w+ and a ({'|'.join(COLORS)}) \w+")
    for scene, texts in drawn:
        if scene.kind == "two":
            assert any(pair.fullmatch(text) for text in texts)
    bound = sum(any(color in text for color in COLORS) for _, texts in drawn for text in texts)
    assert bound > 0.6 * sum(len(texts) for _, texts in drawn)


def test_the_generator_decides_the_scene_and_the_dict_restores_it():
    scene = scenes.sample_scene(rng(5))
    assert scene == scenes.sample_scene(rng(5)) != scenes.sample_scene(rng(6))
    assert Scene.from_dict(scene.to_dict()) == scene
    wide = scenes.sample_scene(rng(5), size_px=64, kind="counting", aspect=1.5)
    assert (wide.width_px, wide.height_px, wide.kind) == (96, 64, "counting")
    assert len({item.shape for item in wide.objects}) == 1
    with pytest.raises(ValueError, match="single, two, counting, mixed"):
        scenes.sample_scene(rng(5), kind="three")


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 5 / 9)]
)
def test_shapes_fill_their_boxes(shape, area):
    scene = Scene(96, 64, "white", "single", (SceneObject(shape, "black", 0.9, 0.4, 0.35),))
    pixels = np.asarray(scenes.render(scene)).astype(float)[..., 0]
    cover = (250 - pixels) / (250 - 25)
    rows, columns = np.nonzero((cover > 0.25).any(1))[0], np.nonzero((cover > 0.25).any(0))[0]
    left, top, right, bottom = scene.box_px(scene.objects[0])
    assert abs(columns[0] - left) < 1.1 and abs(columns[-1] + 1 - right) < 1.1
    assert abs(rows[-1] + 1 - bottom) < 1.1 and abs(rows[0] - top) < (3 if shape == "triangle" else 1.1)
    assert cover.sum() == pytest.approx(area * (right - left) ** 2, rel=0.08)
    assert ((cover > 0.05) & (cover < 0.95)).any(), "edges are anti-aliased"


def test_colors_are_the_vocabulary_s():
    for color, value in COLORS.items():
        scene = Scene(64, 64, "cream", "single", (SceneObject("circle", color, 0.5, 0.5, 0.36),))
        image = scenes.render(scene)
        assert image.getpixel((32, 32)) == value and image.getpixel((1, 1)) == BACKGROUNDS["cream"]


def test_relations_of_boxes_are_genevals():
    draw = rng(4)
    for _ in range(2000):
        x, y, w, h = draw.uniform(0, 100, (4, 2)) * [[1, 1], [1, 1], [0.5, 0.5], [0.5, 0.5]]
        a, b = ((x[i], y[i], x[i] + w[i], y[i] + h[i]) for i in (0, 1))
        assert scenes._genevals_relations(a, b) == set(relative_position(a, b))
