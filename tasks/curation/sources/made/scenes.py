"""Rendered scenes: coloured shapes on plain backgrounds, with truthful captions of several lengths.

A scene contains 1 to 4 objects. Lengths are in units of the SHORTER image side: cx in [0, W/min(W,H)], cy in
[0, H/min(W,H)], size = side of the (square) bounding box, the same for every shape. Scenes are a function of the given
generator, so that the same seed draws the same corpus.

The scenes are made for the shapes benchmark and use its vocabulary. Its held-out combinations never occur: no held-out coloured
shape, no held-out pair of coloured shapes, and no two objects whose centres have a held-out relation (stricter than
GenEval's rule, which also requires a clear offset).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.benchmarks.shapes.vocabulary import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_RELATIONS,
    INVERSE,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
)

# A mix, since binding of colours is learnt from two different objects, and counting from equal shapes.
KINDS = {"single": 0.22, "two": 0.48, "counting": 0.25, "mixed": 0.05}
# width / height. One shape of latents trains fastest, so most scenes are square; the rest fill the aspect buckets.
ASPECTS = {1.0: 0.82, 4 / 3: 0.03, 3 / 4: 0.03, 3 / 2: 0.03, 2 / 3: 0.03, 7 / 4: 0.03, 4 / 7: 0.03}
SIZES = {"small": (0.26, 0.30), "large": (0.36, 0.42)}
# Probability that an object is large, by the number of objects: more of the picture depends on the caption, as long as
# layouts stay free.
LARGE_SHARE = {1: 0.75, 2: 0.75, 3: 0.3, 4: 0.1}
GAP = 0.06  # minimum gap between bounding boxes: closer shapes merge at 64 px
MARGIN = 0.03  # to the frame
MARGIN_OBLONG = 0.07  # larger if encoding may crop to the aspect of a bucket
CLEAR_OFFSET = 0.6  # GenEval needs 0.5; with a margin, a slightly misplaced copy still matches its caption
SUPERSAMPLE = 4
CROSS_ARM = 1 / 3  # width of a cross's arms / its bounding box
SHORT_WORDS, LONG_WORDS = 12, 32


@dataclass(frozen=True)
class SceneObject:
    """One shape; see the module for units."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float

    @property
    def size_word(self) -> str:
        return "small" if self.size < 0.33 else "large"


@dataclass(frozen=True)
class Scene:
    width_px: int
    height_px: int
    background: str
    kind: str
    objects: tuple[SceneObject, ...]

    @property
    def unit_px(self) -> int:
        return min(self.width_px, self.height_px)

    def box_px(self, item: SceneObject) -> tuple[float, float, float, float]:
        """Bounding box (left, top, right, bottom) in pixels, not rounded."""
        half = item.size / 2
        edges = (item.cx - half, item.cy - half, item.cx + half, item.cy + half)
        return tuple(edge * self.unit_px for edge in edges)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        return cls(**{**data, "objects": tuple(SceneObject(**item) for item in data["objects"])})


# ---------------------------------------------------------------- sampling


def sample_scene(
    rng: np.random.Generator, size_px: int = 128, kind: str | None = None, aspect: float | None = None
) -> Scene:
    """Draws a scene without held-out combinations.

    Args:
        rng: the only source of randomness.
        size_px: the shorter side.
        kind: one of `KINDS`; drawn from their shares if None.
        aspect: width / height; drawn from `ASPECTS` if None.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is None:
        kind = _weighted(rng, KINDS)
    elif kind not in KINDS:
        raise ValueError(f"scene kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if aspect is None:
        aspect = _weighted(rng, ASPECTS)
    long_px = round(size_px * max(aspect, 1 / aspect))
    width_px, height_px = (long_px, size_px) if aspect >= 1 else (size_px, long_px)
    background = _choice(rng, tuple(BACKGROUNDS))
    while True:
        looks = _sample_looks(rng, kind)
        # The relation is drawn before positions, so that each is as frequent as the held-out set allows.
        wish = _wished_relation(rng, looks) if kind == "two" else None
        for _ in range(20):
            objects = _place(rng, looks, width_px / size_px, height_px / size_px, wish)
            if objects is not None:
                return Scene(width_px, height_px, background, kind, objects)


def _sample_looks(rng: np.random.Generator, kind: str) -> list[tuple[str, str, float]]:
    """(colour, shape, size) of each object, none held out."""
    while True:
        if kind == "single":
            shapes = [_choice(rng, SHAPES)]
        elif kind == "two":
            shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
        elif kind == "counting":
            shapes = [_choice(rng, SHAPES)] * int(rng.integers(2, 5))
        else:
            shapes = [_choice(rng, SHAPES) for _ in range(int(rng.integers(3, 5)))]
            if len(set(shapes)) < 2:
                continue
        one_color = rng.random() < (0.6 if kind == "counting" else 0.08)
        names = tuple(COLORS)
        colors = [_choice(rng, names)] * len(shapes) if one_color else [_choice(rng, names) for _ in shapes]
        if any(look in HELD_OUT_COLOR_SHAPE for look in zip(colors, shapes, strict=True)):
            continue
        if held_out_pair(list(zip(colors, shapes, strict=True))):
            continue
        if kind == "two" and not one_color and colors[0] == colors[1]:
            continue  # equal colours teach no binding
        one_size = len(shapes) == 4 or rng.random() < (0.7 if kind == "counting" else 0.4)
        words = ["large" if rng.random() < LARGE_SHARE[len(shapes)] else "small" for _ in shapes]
        sizes = words[:1] * len(shapes) if one_size else words
        return [(c, s, float(rng.uniform(*SIZES[z]))) for c, s, z in zip(colors, shapes, sizes, strict=True)]


def _wished_relation(rng: np.random.Generator, looks: list[tuple[str, str, float]]) -> str | None:
    if rng.random() < 0.1:
        return None
    (_, a, _), (_, b, _) = looks
    return _choice(rng, tuple(r for r in RELATIONS if (a, r, b) not in HELD_OUT_RELATIONS))


def _place(
    rng: np.random.Generator,
    looks: list[tuple[str, str, float]],
    width: float,
    height: float,
    wish: str | None,
) -> tuple[SceneObject, ...] | None:
    """Positions without overlap or held-out relation, by rejection; None if there is no room for an object."""
    margin = MARGIN if width == height else MARGIN_OBLONG
    placed: list[SceneObject] = []
    for color, shape, size in looks:
        low = margin + size / 2
        for u, v in rng.random((40, 2)).tolist():
            item = SceneObject(shape, color, low + u * (width - 2 * low), low + v * (height - 2 * low), size)
            if all(_may_stand(item, other) for other in placed) and (
                wish is None or not placed or wish in _relations(placed[0], item, CLEAR_OFFSET)
            ):
                placed.append(item)
                break
        else:
            return None
    return tuple(placed)


def _may_stand(item: SceneObject, other: SceneObject) -> bool:
    reach = (item.size + other.size) / 2 + GAP
    apart = abs(item.cx - other.cx) >= reach or abs(item.cy - other.cy) >= reach
    return apart and not held_out_order(item, other)


def held_out_order(a: SceneObject, b: SceneObject) -> bool:
    """Whether the centres of two objects have a held-out relation."""
    facts = []
    if a.cx != b.cx:
        facts.append("left of" if a.cx < b.cx else "right of")
    if a.cy != b.cy:
        facts.append("above" if a.cy < b.cy else "below")
    return any((a.shape, fact, b.shape) in HELD_OUT_RELATIONS for fact in facts)


def held_out_pair(looks: list[tuple[str, str]]) -> bool:
    """Whether any two of these (colour, shape) are a held-out pair."""
    present = set(looks)
    return any(pair <= present for pair in HELD_OUT_COLOR_PAIRS)


def _relations(a: SceneObject, b: SceneObject, threshold: float = 0.5) -> set[str]:
    """Relations of `a` to `b` by GenEval's rule: each component of the offset between centres is reduced by a tenth of
    both sizes, divided by the original offset's norm, and compared with the threshold."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    shrink = 0.1 * (a.size + b.size)
    x, y = max(abs(dx) - shrink, 0.0), max(abs(dy) - shrink, 0.0)
    least = threshold * (dx * dx + dy * dy) ** 0.5
    names = set()
    if x > least:
        names.add("left of" if dx < 0 else "right of")
    if y > least:
        names.add("above" if dy < 0 else "below")
    return names


def _choice(rng: np.random.Generator, items: tuple) -> Any:
    return items[int(rng.integers(len(items)))]


def _weighted(rng: np.random.Generator, shares: dict[Any, float]) -> Any:
    at = rng.random() * sum(shares.values())
    for item, share in shares.items():
        at -= share
        if at < 0:
            return item
    return item


# ---------------------------------------------------------------- rendering


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image; edges anti-aliased by supersampling each object's mask."""
    image = Image.new("RGB", (scene.width_px, scene.height_px), BACKGROUNDS[scene.background])
    for item in scene.objects:
        left, top, right, bottom = scene.box_px(item)
        x0, y0 = int(left), int(top)
        mask = Image.new("L", (_cells(right, x0), _cells(bottom, y0)), 0)
        draw = ImageDraw.Draw(mask)
        _draw_shape(draw, item.shape, (left - x0) * SUPERSAMPLE, (top - y0) * SUPERSAMPLE, (right - left) * SUPERSAMPLE)
        image.paste(COLORS[item.color], (x0, y0), mask.reduce(SUPERSAMPLE))
    return image


def _cells(end: float, start: int) -> int:
    return (int(np.ceil(end)) - start) * SUPERSAMPLE


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, side: float) -> None:
    """Fills a shape of bounding box (x, y, x + side, y + side), in mask pixels. Pillow includes the last pixel."""
    x0, y0, x1, y1 = round(x), round(y), round(x + side) - 1, round(y + side) - 1
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=255)
    elif shape == "square":
        draw.rectangle((x0, y0, x1, y1), fill=255)
    elif shape == "triangle":
        draw.polygon(((x0 + x1) / 2, y0, x1, y1, x0, y1), fill=255)
    else:
        assert shape == "cross", shape
        inset = round(side * (1 - CROSS_ARM) / 2)
        draw.rectangle((x0 + inset, y0, x1 - inset, y1), fill=255)
        draw.rectangle((x0, y0 + inset, x1, y1 - inset), fill=255)


# ---------------------------------------------------------------- captions


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """4 to 6 different true captions, lowercase, without punctuation, short ones first.

    Short ones (at most 12 words) use GenEval's wording; the last is the longest (at most 32 words). Every caption names
    all objects of the scene.
    """
    others = {"single": _single, "counting": _counting, "mixed": _mixed}
    made = _two(scene, rng) if scene.kind == "two" else others[scene.kind](scene)
    long = _long(scene)
    unique = list(dict.fromkeys(made))[:6]
    return unique + [long] if long not in unique else unique


def relations(scene: Scene, a: SceneObject, b: SceneObject) -> list[str]:
    """The clear relations of `a` to `b`, confirmed by the benchmark's own rule."""
    clear = _relations(a, b, CLEAR_OFFSET)
    return sorted(clear & _genevals_relations(scene.box_px(a), scene.box_px(b))) if clear else []


def _genevals_relations(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> set[str]:
    """GenEval's rule for boxes (x0, y0, x1, y1) in px: on each axis the offset of the centres is reduced by a tenth of
    both extents; the rest must exceed half of the offset's length."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extents = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [np.sign(d) * max(abs(d) - 0.1 * extent, 0) for d, extent in zip(offset, extents, strict=True)]
    if max(map(abs, left)) < 1e-3:
        return set()
    dx, dy = (d / np.hypot(*offset) for d in left)
    holds = {"above": dy < -0.5, "below": dy > 0.5, "left of": dx < -0.5, "right of": dx > 0.5}
    return {relation for relation, true in holds.items() if true}


def _noun(item: SceneObject, color: bool = True, size: bool = False) -> str:
    return " ".join(["a"] + [item.size_word] * size + [item.color] * color + [item.shape])


def _ground(scene: Scene) -> str:
    return f"on a {scene.background} background"


def _where(scene: Scene, item: SceneObject) -> str:
    """The third of the frame that contains the object's centre."""
    across = int(3 * item.cx * scene.unit_px / scene.width_px)
    down = int(3 * item.cy * scene.unit_px / scene.height_px)
    word = " ".join(w for w in (("top", "", "bottom")[down], ("left", "", "right")[across]) if w)
    return f"at the {word or 'center'}"


def _groups(items: list[SceneObject], color: bool, size: bool = False) -> str:
    """Counts equal objects together: `a red circle and two blue squares`."""

    def look(item: SceneObject) -> tuple[str, ...]:
        return tuple([item.size_word] * size + [item.color] * color)

    counts = Counter((look(item), item.shape) for item in items)
    parts = []
    for (words, shape), n in counts.items():
        number, noun = ("a", shape) if n == 1 else (NUMBERS[n], PLURALS[shape])
        parts.append(" ".join((number, *words, noun)))
    return " and ".join(parts)


def _in_reading_order(scene: Scene) -> list[SceneObject]:
    """From the top left corner to the bottom right one: of two objects the left one first, or the upper one if they are
    further apart vertically. A caption without a relation then restricts the layout (docs/tiny.md)."""
    return sorted(scene.objects, key=lambda item: (item.cx + item.cy, item.cx))


def _single(scene: Scene) -> list[str]:
    (item,) = scene.objects
    return [
        f"a photo of {_noun(item)}",
        f"a photo of {_noun(item, color=False)}",
        f"{_noun(item, size=True)} {_ground(scene)}",
    ]


def _two(scene: Scene, rng: np.random.Generator) -> list[str]:
    first, second = _in_reading_order(scene)
    plain = [
        f"a photo of {_noun(first)} and {_noun(second)}",
        f"a photo of {_noun(first, color=False)} and {_noun(second, color=False)}",
    ]
    a, b = (first, second) if rng.random() < 0.5 else (second, first)
    relative = relations(scene, a, b)
    if not relative:
        return plain + [
            f"{_noun(first)} and {_noun(second)} {_ground(scene)}",
            f"{_noun(first, size=True)} and {_noun(second, size=True)} {_ground(scene)}",
        ]
    relation = _choice(rng, tuple(relative))
    # The relation without colours is stated from the other side, so that one image teaches both directions.
    return [
        plain[0],
        f"a photo of {_noun(a)} {relation} {_noun(b)}",
        f"a photo of {_noun(b, color=False)} {INVERSE[relation]} {_noun(a, color=False)}",
        plain[1],
        f"{_noun(a, size=True)} {relation} {_noun(b, size=True)} {_ground(scene)}",
    ]


def _counting(scene: Scene) -> list[str]:
    items = _in_reading_order(scene)
    plain = _groups(items, color=False)
    in_color = _groups(items, color=True)
    made = [f"a photo of {plain}", f"{plain} {_ground(scene)}"]
    if len(in_color.split()) + 3 <= SHORT_WORDS:
        made.insert(1, f"a photo of {in_color}")
    return made + [f"{in_color} {_ground(scene)}", f"{_groups(items, color=True, size=True)}"]


def _mixed(scene: Scene) -> list[str]:
    items = _in_reading_order(scene)
    made = []
    for text in (_groups(items, color=True), _groups(items, color=False)):
        full = f"a photo of {text}"
        made.append(full if len(full.split()) <= SHORT_WORDS else text)
    # Four different coloured shapes need more than a short caption's words: then they come as a medium one.
    made.sort(key=lambda text: len(text.split()) > SHORT_WORDS)
    return made + [f"{_groups(items, color=True, size=True)} {_ground(scene)}"]


def _long(scene: Scene) -> str:
    """Size, colour, place and background; leaves out from the end what exceeds the limit."""
    items = _in_reading_order(scene)
    placed = [f"{_noun(item, size=True)} {_where(scene, item)}" for item in items]
    brief = [f"{_noun(item)} {_where(scene, item)}" for item in items]
    sized = [_noun(item, size=True) for item in items]
    options = (
        f"a photo of {' and '.join(placed)} {_ground(scene)}",
        f"{' and '.join(placed)} {_ground(scene)}",
        f"{' and '.join(placed)}",
        f"{' and '.join(brief)}",
        f"a photo of {' and '.join(sized)} {_ground(scene)}",
    )
    return next(text for text in options if len(text.split()) <= LONG_WORDS)
