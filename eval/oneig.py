"""OneIG-Bench's scoring, without any model: alignment, text, reasoning, style, diversity.

    one picture per prompt, a grid --split_grid--> tiles --(judges)--> answers, OCR, embeddings, distances
    answers of a prompt --{alignment,style,diversity,reasoning}_score--> score of the prompt, None without tiles
    scores of all prompts --summarise_{...}--> {"score": ..., "prompts": ...} --official_files--> the official CSVs

Every summary has "score", "prompts" ({prompt: score or None}), "scored" (their number) and "failed" (prompts without
a score, which the mean leaves out, as in the official code). A prompt of alignment and diversity is named
"<class>_<id>", such as "anime_003"; the others have the bare id.

Source: scripts/ of github.com/OneIG-Bench/OneIG-Benchmark at 41b4983. `split_grid` and `summarise_text` describe the
bugs that `mode="official"` repeats and "fixed" does not.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval.modes import Mode, check_mode
from eval.official.oneig_files import STYLES, official_files

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "alignment_score",
    "calculate_char_match_ratio",
    "clean_and_remove_hallucinations",
    "diversity_score",
    "levenshtein_distance",
    "max_new_tokens",
    "official_files",
    "overall",
    "preprocess_string",
    "reasoning_score",
    "split_grid",
    "style_score",
    "summarise_alignment",
    "summarise_diversity",
    "summarise_reasoning",
    "summarise_style",
    "summarise_text",
]

DIMENSIONS = ("alignment", "text", "reasoning", "style", "diversity")
YES = "Yes"
MAX_EDIT_DISTANCE = {"EN": 100, "ZH": 50}
HALLUCINATIONS = ("addCriterion", "No text recognized.")

_KEPT = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_DROPPED = re.compile(f"[^{_KEPT}\\s]")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_SPACE = re.compile(r"\s+")


# ---- tiles


def split_grid(image: Image.Image, grid: tuple[int, int] = (2, 2), mode: Mode = "official") -> list[bytes]:
    """Cuts a picture into its tiles, row by row, leaves out the black ones, and returns the others as JPEG files.

    Every judge sees the tiles through JPEG (quality 75). Pixels that do not fill a tile are cut off.

    Args:
        image: the picture of a prompt; black tiles stand for images that could not be generated.
        grid: (columns, rows).
        mode: "official" looks for black in pictures of three channels only, and cannot write others than RGB and grey;
            "fixed" reads every picture as RGB first.

    Raises:
        ValueError: a grid below (1, 1), or mode="official" and a picture whose mode JPEG does not support.
    """
    check_mode(mode)
    columns, rows = grid
    if columns < 1 or rows < 1:
        raise ValueError(f"grid={tuple(grid)} must be (columns, rows), each at least 1")
    if mode == "fixed":
        image = image.convert("RGB")
    width, height = image.width // columns, image.height // rows
    tiles = []
    for row in range(rows):
        for column in range(columns):
            box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
            tile = image.crop(box)
            if min(tile.size) == 0 or is_black(tile):
                continue
            file = io.BytesIO()
            try:
                tile.save(file, format="JPEG")
            except OSError as error:
                raise ValueError(
                    f"a picture of mode {image.mode} must be RGB ({error}); mode='fixed' reads it so"
                ) from None
            tiles.append(file.getvalue())
    return tiles


def is_black(tile: Image.Image) -> bool:
    """Whether all pixels of a tile of three channels are black: it stands for an image that could not be generated."""
    return len(tile.getbands()) == 3 and tile.getbbox() is None


# ---- alignment


def alignment_score(
    answers: Mapping[int, Sequence[str]], dependency: Mapping[int, Sequence[int]], tiles: int | None = None
) -> float | None:
    """The score of one prompt: the share of its questions that score, mean over its tiles; None without tiles.

    A question scores if its answer is exactly "Yes" and no parent's answer is another. Parents count by their own
    answers, so zeros do not cascade; a parent that is not a question is ignored.

    Args:
        answers: {qid: one answer per tile}, qids from 1 up without a gap.
        dependency: {qid: parents}, 0 for none.
        tiles: number of tiles that count, from the first; None: all.

    Raises:
        ValueError: no questions, a gap between qids, or too few answers to a question.
    """
    if tiles is None:
        tiles = max((len(texts) for texts in answers.values()), default=None)
    if tiles == 0:
        return None
    if tiles is None or not answers or sorted(answers) != list(range(1, len(answers) + 1)):
        raise ValueError(f"questions {sorted(answers)} must be numbered from 1 up, without a gap")
    short = [qid for qid, texts in answers.items() if len(texts) < tiles]
    if short:
        raise ValueError(f"questions {short} have fewer than {tiles} answers; each needs one per tile")
    sums = [0.0] * tiles
    for qid, texts in answers.items():
        parents = [answers[parent] for parent in dependency.get(qid, ()) if parent != 0 and parent in answers]
        for tile in range(tiles):
            sums[tile] += texts[tile] == YES and all(parent[tile] == YES for parent in parents)
    return sum(total / len(answers) for total in sums) / tiles


def summarise_alignment(scores: Mapping[str, float | None] | Iterable[float | None]) -> dict[str, Any]:
    """The mean over prompts; "classes" has the mean of each class.

    Args:
        scores: {"<class>_<id>": score or None}, or the scores alone.

    Raises:
        ValueError: no prompt has a score.
    """
    summary = _summary(scores)
    return summary | {"classes": _class_means(summary["prompts"])}


def _by_prompt(values: Mapping[Any, Any] | Iterable[Any]) -> dict[Any, Any]:
    return dict(values) if isinstance(values, Mapping) else dict(enumerate(values))


def _summary(scores) -> dict[str, Any]:
    prompts = {
        key: None if value is None or math.isnan(value) else float(value) for key, value in _by_prompt(scores).items()
    }
    values = [value for value in prompts.values() if value is not None]
    if not values:
        raise ValueError(f"none of {len(prompts)} prompts has a score")
    return {
        "score": math.fsum(values) / len(values),
        "prompts": prompts,
        "scored": len(values),
        "failed": [key for key, value in prompts.items() if value is None],
    }


def _class_means(prompts: Mapping[Any, float | None]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, value in prompts.items():
        name, separator, _ = str(key).rpartition("_")
        if separator and value is not None:
            groups.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in groups.items()}


# ---- text


def preprocess_string(text: str) -> str:
    """The text that is compared: letters (ASCII and French), digits, Chinese characters and single spaces; no spaces
    where any Chinese character is left."""
    cleaned = _DROPPED.sub("", text)
    return _SPACE.sub("" if _CHINESE.search(cleaned) else " ", cleaned).strip()


def clean_and_remove_hallucinations(texts: Iterable[str]) -> list[str]:
    """Removes from each text known hallucinations of the OCR judge, and its statement that there is no text."""
    cleaned = list(texts)
    for phrase in HALLUCINATIONS:
        # A removal can create the phrase again; an adjacent line break is removed too.
        for part in (phrase, f"\n{phrase}", f"{phrase}\n"):
            cleaned = [text.replace(part, "") for text in cleaned]
    return cleaned


def levenshtein_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The least number of insertions, deletions and replacements that turn `a` into `b`.

    A column of the usual table is one integer: Myers' bit-parallel algorithm (1999) as Hyyrö (2003) has it.
    """
    if not a or not b:
        return len(a) + len(b)
    everywhere, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    places: dict[Hashable, int] = {}
    for index, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << index
    up, down, distance = everywhere, 0, len(a)  # vertical differences of +1 and -1
    for item in b:
        equal = places.get(item, 0)
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        plus = down | (~(horizontal | up) & everywhere)
        minus = up & horizontal
        distance += bool(plus & last) - bool(minus & last)
        plus, minus = plus << 1 | 1, minus << 1
        up = (minus | ~(vertical | plus)) & everywhere
        down = plus & vertical & everywhere
    return distance


def calculate_char_match_ratio(text_gt: str, ocr: str) -> tuple[int, float, int]:
    """Number of words of the wanted text in the OCR, in any order; characters instead of words if any is Chinese.

    Args:
        text_gt, ocr: both after `preprocess_string`.

    Returns:
        (matched, matched / count or 0.0, count of wanted words)
    """
    wanted, seen = (text_gt, ocr) if _CHINESE.search(text_gt) else (text_gt.split(), ocr.split())
    matched = (Counter(wanted) & Counter(seen)).total()
    return matched, matched / len(wanted) if wanted else 0.0, len(wanted)


def max_new_tokens(text_content: str) -> int:
    """Token limit of the OCR judge for a prompt's wanted text: 256 if it has over 60 words, else 128."""
    return 256 if len(text_content.split()) > 60 else 128


def compare_text(text_content: str, ocr: str) -> tuple[int, bool, float]:
    """(edit distance, whether it is 0, share of the wanted words that were read) of one tile."""
    distance, _, ratio, _ = _compared(text_content, ocr)
    return distance, distance == 0, ratio


def _compared(text_content: str, ocr: str) -> tuple[int, int, float, int]:
    """(edit distance, matched words, their share, wanted words) of one tile."""
    wanted, read = preprocess_string(text_content), preprocess_string(clean_and_remove_hallucinations([ocr])[0])
    return levenshtein_distance(read, wanted), *calculate_char_match_ratio(wanted, read)


def text_score(ed: float, cr: float, wac: float, language: Literal["EN", "ZH"] = "EN") -> float:
    """1 - min(MAX, ED) (1 - CR) (1 - WAC) / MAX, MAX being 100 in English and 50 in Chinese.

    Raises:
        ValueError: an unknown language.
    """
    if language not in MAX_EDIT_DISTANCE:
        raise ValueError(f"language={language!r} must be one of {', '.join(MAX_EDIT_DISTANCE)}")
    limit = MAX_EDIT_DISTANCE[language]
    return 1 - min(limit, ed) * (1 - cr) * (1 - wac) / limit


def summarise_text(
    contents: Mapping[str, str] | Sequence[str],
    ocr: Mapping[str, Sequence[str] | None] | Sequence[Sequence[str] | None],
    language: Literal["EN", "ZH"] = "EN",
    mode: Mode = "official",
) -> dict[str, Any]:
    """The `text_score` of the benchmark.

    ED is the mean edit distance over all tiles, CR the share of tiles at distance 0, WAC the matched words of all
    tiles / their wanted words.

    Args:
        contents: {id: wanted text}, the column text_content of text_content.csv, in its order; or the texts alone.
        ocr: {id: what the judge read in each tile}, None or no entry without a picture; or one per text.
        language: of the benchmark.
        mode: a picture whose tiles are all black has no texts ([]). "official" then scores the texts of the prompt
            before it once more, under this prompt, as the official code does; "fixed" gives it no score.

    Returns:
        {"ED", "CR", "WAC", "score", "prompts": {id: [ED, CR, WAC (mean of the tiles' ratios)] or None}, "scored",
        "failed"}

    Raises:
        ValueError: an unknown language, no text at all, or mode="official" and a first picture that is all black.
    """
    check_mode(mode)
    contents, ocr = _by_prompt(contents), _by_prompt(ocr)
    distances: list[int] = []
    matched_words = wanted_words = 0
    prompts: dict[str, list[float] | None] = {}
    before: Sequence[str] = ()
    for key, content in contents.items():
        prompts[key] = None
        texts = ocr.get(key)
        if texts is None:
            continue
        if isinstance(texts, str):
            raise ValueError(f"ocr of prompt {key!r} is one text, {texts!r}; it must be a list with a text per tile")
        if len(texts) == 0 and mode == "official":
            if not before:
                raise ValueError(f"prompt {key!r} has only black tiles and none before it was read; use mode='fixed'")
            texts = before
        if len(texts) == 0:
            continue
        before = texts
        rows = [_compared(content, text) for text in texts]
        edits = [distance for distance, _, _, _ in rows]
        distances += edits
        matched_words += sum(matched for _, matched, _, _ in rows)
        wanted_words += sum(count for _, _, _, count in rows)
        ratios = [ratio for _, _, ratio, _ in rows]
        prompts[key] = [sum(edits) / len(rows), edits.count(0) / len(rows), sum(ratios) / len(rows)]
    if not distances or not wanted_words:
        raise ValueError(f"none of {len(contents)} prompts has a text to compare")
    ed, cr, wac = sum(distances) / len(distances), distances.count(0) / len(distances), matched_words / wanted_words
    return {
        "ED": ed,
        "CR": cr,
        "WAC": wac,
        "score": text_score(ed, cr, wac, language),
        "prompts": prompts,
        "scored": sum(value is not None for value in prompts.values()),
        "failed": [key for key, value in prompts.items() if value is None],
    }


# ---- style, diversity, reasoning


def style_score(csd: Any, se: Any, csd_refs: Any, se_refs: Any) -> float | None:
    """The score of one prompt: for each tile the mean of the best CSD and the best OneIG style similarity to the
    references, none below 0; mean over the tiles, None without any.

    The official style encoder works in bfloat16, and so do its products. NumPy has no such type: where all values of
    `se` and `se_refs` are bfloat16 values, products are rounded to bfloat16.

    Args:
        csd, se: unit embeddings, [tiles, 768] and [tiles, 1280], or of one tile without the first axis; arrays, lists
            or tensors.
        csd_refs, se_refs: of the references of the prompt's style, [references, 768] and [references, 1280].

    Raises:
        ValueError: unequal numbers of tiles, or widths that do not fit.
    """
    csd, se, csd_refs, se_refs = map(_rows_of, (csd, se, csd_refs, se_refs))
    if not csd.size and not se.size:
        return None
    if len(csd) != len(se) or csd.shape[1] != csd_refs.shape[1] or se.shape[1] != se_refs.shape[1]:
        raise ValueError(
            f"embeddings of shapes {csd.shape} and {se.shape} must have one row per tile, and the width of their "
            f"references, {csd_refs.shape} and {se_refs.shape}"
        )
    csd_best = (csd.astype(np.float64) @ csd_refs.T.astype(np.float64)).max(axis=1)
    products = se.astype(np.float64) @ se_refs.T.astype(np.float64)
    if _is_bfloat16(se) and _is_bfloat16(se_refs):
        products = _to_bfloat16(products.astype(np.float32)).astype(np.float64)
    tiles = (np.maximum(csd_best, 0) + np.maximum(products.max(axis=1), 0)) / 2
    return float(tiles.mean())


def _rows_of(values: Any) -> np.ndarray:
    """[..., width] as float32 [rows, width]; also a torch tensor of any dtype and device."""
    values = values.detach().float().cpu().numpy() if hasattr(values, "detach") else np.asarray(values, np.float32)
    return values.reshape(-1, values.shape[-1]) if values.size else np.zeros((0, 0), np.float32)


def _is_bfloat16(values: np.ndarray) -> bool:
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16 (ties to even), as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def summarise_style(
    styles: Mapping[str, Any] | Sequence[Any], scores: Mapping[str, float | None] | Sequence[float | None]
) -> dict[str, Any]:
    """The mean over the prompts with a style; "styles" has the mean of each style that has a score.

    Args:
        styles: {id: style}, the column class of style.csv; empty, None or nan for a prompt without one, which is left
            out. Or one style per score.
        scores: {id: score or None}, or the scores alone.

    Raises:
        ValueError: a prompt without an entry in `styles`, an unknown style, or no score at all.
    """
    if not isinstance(scores, Mapping) and len(styles) != len(scores):
        raise ValueError(f"{len(styles)} styles and {len(scores)} scores must be as many")
    scores, named = _by_prompt(scores), _by_prompt(styles)
    absent = [key for key in scores if key not in named]
    if absent:
        raise ValueError(f"prompts {absent[:5]} have scores but no row in the table of styles (style.csv)")
    style_of = {key: style_name(named[key]) for key in scores}
    summary = _summary({key: score for key, score in scores.items() if style_of[key]})
    groups: dict[str, list[float]] = {}
    for key, score in summary["prompts"].items():
        if score is not None:
            groups.setdefault(style_of[key], []).append(score)
    means = {style: math.fsum(groups[style]) / len(groups[style]) for style in STYLES if style in groups}
    return summary | {"styles": means}


def style_name(value: Any) -> str:
    """The name of a style among `STYLES` from its spelling in style.csv; "" for none.

    Raises:
        ValueError: it is not one of `STYLES`.
    """
    if value is None or value != value or str(value)[:3] == "nan" or not str(value):
        return ""
    name = str(value).lower().replace(" ", "_")
    if name not in STYLES:
        raise ValueError(f"style {value!r} is not one of {', '.join(STYLES)}")
    return name


def diversity_score(distances: Sequence[float]) -> float | None:
    """The score of one prompt: the mean distance over all pairs of its tiles; None without pairs."""
    return sum(distances) / len(distances) if len(distances) else None


def summarise_diversity(
    scores: Mapping[str, float | None] | Iterable[float | None],
    classes: Mapping[str, str] | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The mean over prompts; "classes" has the mean of each class, None for one without a score.

    Args:
        scores: {"<class>_<id>": score or None}, or the scores alone.
        classes: the classes to report, in order; or {prompt: class}, for prompts with other names. None: those of the
            scores.

    Raises:
        ValueError: no prompt has a score.
    """
    summary = _summary(scores)
    if isinstance(classes, Mapping):
        means = _class_means({f"{classes[key]}_{key}": value for key, value in summary["prompts"].items()})
    else:
        means = _class_means(summary["prompts"])
        means = means if classes is None else {name: means.get(name) for name in classes}
    return summary | {"classes": means}


def reasoning_score(similarities: Sequence[float | None] | None) -> float | None:
    """The score of one prompt: the mean cosine of its tiles to the expected answer; None if no tile has one."""
    values = [value for value in similarities or () if value is not None]
    return sum(values) / len(values) if values else None


def summarise_reasoning(scores: Mapping[str, float | None] | Iterable[float | None]) -> dict[str, Any]:
    """The mean over prompts.

    Args:
        scores: {id: score or None}, or the scores alone.

    Raises:
        ValueError: no prompt has a score.
    """
    return _summary(scores)


def overall(dimensions: Mapping[str, float | Mapping[str, Any]]) -> float:
    """The mean of the five dimensions: a convention of published tables, not of the official code.

    Args:
        dimensions: {dimension: score, or its summary}.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    if set(dimensions) != set(DIMENSIONS):
        raise ValueError(f"dimensions {sorted(dimensions)} must be {', '.join(DIMENSIONS)}")
    values = [value["score"] if isinstance(value, Mapping) else value for value in dimensions.values()]
    return math.fsum(values) / len(values)
