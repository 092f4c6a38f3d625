"""Writes and reads OneIG-Bench's result files: the CSVs that the official scripts write to results/.

Source: save2csv of scripts/utils/utils.py (pandas' to_csv) and its callers, github.com/OneIG-Bench/OneIG-Benchmark at
41b4983. The official names end in a time stamp; fine_grained_analysis.py looks for "<dimension>_prompt_score_EN*.csv".
"""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Language = Literal["EN", "ZH"]
# The columns of style_style_score_*.csv, in the order of scripts/style/style_score.py.
STYLES = (
    "abstract_expressionism", "art_nouveau", "baroque", "chinese_ink_painting", "cubism", "fauvism", "impressionism",
    "line_art", "minimalism", "pointillism", "pop_art", "rococo", "ukiyo-e", "clay", "crayon", "graffiti", "lego",
    "comic", "pencil_sketch", "stone_sculpture", "watercolor", "celluloid", "chibi", "cyberpunk", "ghibli", "impasto",
    "pixar", "pixel_art", "3d_rendering",
)  # fmt: skip


def official_files(dimension: str, summary: Mapping[str, Any], model: str, language: Language = "EN") -> dict[str, str]:
    """{file name: text} of the output of a dimension's official script.

    Args:
        dimension: "alignment", "text", "reasoning", "style" or "diversity".
        summary: the result of `eval.oneig.summarise_<dimension>`.
        model: the name of the column.
        language: part of the names.

    Raises:
        ValueError: an unknown dimension or language.
    """
    if language not in ("EN", "ZH"):
        raise ValueError(f"language={language!r} must be 'EN' or 'ZH'")
    prompts = summary["prompts"]
    files = {}
    if dimension == "alignment" or dimension == "reasoning":
        columns: dict[str, Any] = {dimension: summary["score"]}
    elif dimension == "text":
        columns = {name: summary[name] for name in ("ED", "CR", "WAC")} | {"text score": summary["score"]}
    elif dimension == "style":
        columns = {"style": summary["score"]}
        by_style = {style: summary["styles"].get(style) for style in STYLES}
        files[f"style_style_score_{language}.csv"] = _csv(["", *by_style], [[model, *by_style.values()]])
    elif dimension == "diversity":
        columns = {**summary["classes"], "total average": summary["score"]}
    else:
        raise ValueError(f"dimension {dimension!r} must be alignment, text, reasoning, style or diversity")
    # The text script alone leaves its prompts in the order of its table.
    order = list(prompts) if dimension == "text" else sorted(prompts)
    if dimension == "diversity":
        order = [key for key in order if prompts[key] is not None]  # the script skips them
    return {
        f"{dimension}_score_{language}.csv": _csv(["", *columns], [[model, *columns.values()]]),
        **files,
        f"{dimension}_prompt_score_{language}.csv": _csv(["", model], [[key, prompts[key]] for key in order]),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    # csv writes None as nothing, as pandas does, and floats in their shortest form.
    writer.writerows(rows)
    return file.getvalue()


def read_prompt_scores(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """{prompt: score or None} of an official "<dimension>_prompt_score_*.csv", for `eval.oneig.summarise_...`; a text
    prompt's score is [ED, CR, WAC].

    Args:
        model: the column; None if there is only one.

    Raises:
        ValueError: the file is absent or of another form, or has no such column; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of prompt scores (results/<dimension>_prompt_score_EN_<time>.csv)")
    scores: dict[str, Any] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if len(header) < 2 or header[0]:
            raise ValueError(f"{path} has the header {','.join(header)!r}; it must be ',<model>'")
        if model is None and len(header) > 2:
            raise ValueError(f"{path} has several models; choose one of {', '.join(header[1:])}")
        if model is not None and model not in header[1:]:
            raise ValueError(f"{path} has no model {model!r}; it has {', '.join(header[1:])}")
        column = header.index(model, 1) if model is not None else 1
        for row in reader:
            try:
                value = row[column]
                scores[row[0]] = None if value == "" else ast.literal_eval(value)
            except (IndexError, ValueError, SyntaxError):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {','.join(row)!r} is not a prompt and score"
                ) from None
    return scores


def read_scores(path: str | Path) -> dict[str, dict[str, float | None]]:
    """{model: {column: score or None}} of an official "<dimension>_score_*.csv" or "style_style_score_*.csv".

    Raises:
        ValueError: the file is absent or of another form; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of scores (results/<dimension>_score_EN_<time>.csv)")
    scores: dict[str, dict[str, float | None]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        _, *columns = next(reader, [""])
        for row in reader:
            try:
                values = [None if value == "" else float(value) for value in row[1:]]
                scores[row[0]] = dict(zip(columns, values, strict=True))
            except (IndexError, ValueError):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {','.join(row)!r} is not a model and its scores"
                ) from None
    if not scores:
        raise ValueError(f"{path} has no scores")
    return scores
