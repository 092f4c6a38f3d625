"""The vocabulary of the `shapes` benchmark for scenes and prompts, and the combinations held out of training.

Scenes (tasks/curation) and the benchmark share these names, so that training captions and prompts mean the same. A
held-out combination occurs in no training scene, hence in no training caption.
"""

from __future__ import annotations

from eval.official.geneval_files import RELATIONS as RELATIONS

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 225),
    "yellow": (240, 205, 30),
    "purple": (150, 50, 200),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (200, 200, 200), "cream": (250, 236, 205)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

# (color, shape): no training scene shows one.
HELD_OUT_COLOR_SHAPE = frozenset({("purple", "cross"), ("yellow", "triangle")})
# (shape, relation, shape), closed under inversion: no training scene of two objects shows one.
HELD_OUT_RELATIONS = frozenset(
    {
        ("triangle", "above", "circle"),
        ("circle", "below", "triangle"),
        ("cross", "left of", "square"),
        ("square", "right of", "cross"),
    }
)
# Unordered pairs of coloured shapes: no training scene shows both of a pair.
HELD_OUT_COLOR_PAIRS = frozenset(
    {
        frozenset({("red", "circle"), ("blue", "square")}),
        frozenset({("green", "triangle"), ("red", "cross")}),
        frozenset({("black", "square"), ("yellow", "circle")}),
        frozenset({("blue", "triangle"), ("purple", "circle")}),
    }
)
