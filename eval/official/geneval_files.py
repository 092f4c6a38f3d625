"""GenEval's files: prompts, the folder layout of images, and results.jsonl.

    evaluation_metadata.jsonl          a prompt per line
    DIR/00000/metadata.jsonl           the prompt of folder 0
              samples/0000.png ...     its images
    results.jsonl                      a judged image per line

`eval.geneval` exports these names too. Source: evaluation/evaluate_images.py of
github.com/djghosh13/geneval at af4902f.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.files import read_json_lines, replacing_text

RELATIONS = ("left of", "right of", "above", "below")
RESULT_KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """A prompt file: one metadata object per line, as GenEval's evaluation_metadata.jsonl.

    Raises:
        ValueError: the file is absent or empty, or a line is not a prompt; names the line.
    """
    prompts = []
    for number, metadata in read_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(metadata, dict) or not {"tag", "prompt", "include"} <= metadata.keys():
            raise ValueError(f"{where}: a prompt needs 'tag', 'prompt' and 'include'")
        for part in ("include", "exclude"):
            _check_clauses(metadata.get(part, []), f"{where}: {part}")
        prompts.append(metadata)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _check_clauses(clauses: Any, where: str) -> None:
    """Refuses, before any image is drawn, what `eval.geneval.judge_image` cannot judge, or would always judge as wrong."""
    if not isinstance(clauses, list) or not all(
        isinstance(c, dict) and isinstance(c.get("class"), str) for c in clauses
    ):
        raise ValueError(f"{where} must be a list of objects with 'class' and 'count', not {clauses!r}")
    for number, clause in enumerate(clauses):
        count = clause.get("count")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{where}[{number}] has count={count!r}; it must be a whole number from 1")
        if "position" in clause:
            match clause["position"]:
                case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
                    pass
                case position:
                    raise ValueError(
                        f"{where}[{number}] has position={position!r}; it must be [one of {', '.join(RELATIONS)}; the number "
                        "of an earlier clause, from 0]"
                    )


def expected_images(metadata: Mapping[str, Any], images_per_prompt: int = 1) -> int:
    """Number of images of a prompt in a run: `images_per_prompt`, times the prompt's own "images" if it has one."""
    return images_per_prompt * metadata.get("images", 1)


def walk_layout(
    images_dir: str | Path,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    images_per_prompt: int | None = None,
    missing: Literal["error", "official"] = "error",
) -> list[dict[str, Any]]:
    """The images of DIR/00000/{metadata.jsonl, samples/0000.png ...}, in order.

    As in the official code, a folder counts if its name `isdigit()`, and a file if its name starts with digits and
    ".png"; other entries are skipped.

    Args:
        prompts: the expected prompts (folder n is prompt n); default: those of the folders.
        images_per_prompt: see `expected_images`; default: that of the fullest folder.
        missing: "error" refuses a missing prompt or image; "official" scores existing images, with a smaller
            denominator.

    Returns:
        one {"folder", "metadata", "path"} per image; `folder` is the folder's name.

    Raises:
        ValueError: nothing to score, a folder without metadata or of another prompt, or (missing="error") a gap.
    """
    if missing not in ("error", "official"):
        raise ValueError(f"missing={missing!r} must be 'error' or 'official'")
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise ValueError(f"{images_dir} is not a folder of images")
    names = [p.name for p in images_dir.iterdir() if p.is_dir() and p.name.isdigit()]
    folders = []
    for name in sorted(names, key=lambda n: (len(n), n)):
        folder = images_dir / name
        file = folder / "metadata.jsonl"
        if not file.is_file():
            raise ValueError(f"{folder} has no metadata.jsonl")
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # errors of JSON or UTF-8
            raise ValueError(f"{file} is not a JSON object: {error}") from error
        files = [p for p in folder.glob("samples/*") if p.is_file() and re.match(r"\d+\.png", p.name)]
        folders.append((name, metadata, sorted(files, key=lambda p: (len(p.name), p.name))))
    if prompts is not None:
        _check_prompts(images_dir, folders, prompts, missing)
    if missing == "error":
        if images_per_prompt is None:
            images_per_prompt = max((-(-len(f) // m.get("images", 1)) for _, m, f in folders), default=1) or 1
        for name, metadata, files in folders:
            wanted = expected_images(metadata, images_per_prompt)
            if len(files) != wanted:
                raise ValueError(
                    f"{images_dir / name} holds {len(files)} images, not {wanted}; complete or clear it, or score what "
                    "is there with missing='official' (which changes the denominator)"
                )
    images = [{"folder": name, "metadata": m, "path": path} for name, m, files in folders for path in files]
    if not images:
        raise ValueError(f"{images_dir} holds no image to score (expected 00000/samples/0000.png)")
    return images


def _check_prompts(images_dir, folders, prompts, missing) -> None:
    # isdigit() is also true for superscripts, which are not prompt numbers.
    present = {int(name) if name.isdecimal() else len(prompts): metadata for name, metadata, _ in folders}
    for index, metadata in present.items():
        # Through JSON: a tuple in the caller's metadata is a list in the file.
        if index >= len(prompts) or json.loads(json.dumps(prompts[index])) != metadata:
            wanted = prompts[index]["prompt"] if index < len(prompts) else "no such prompt"
            shown = metadata.get("prompt")
            raise ValueError(f"{images_dir}/{index:05d} shows {shown!r}, not prompt {index} ({wanted!r})")
    absent = [i for i in range(len(prompts)) if i not in present]
    if absent and missing == "error":
        raise ValueError(
            f"{images_dir} lacks {len(absent)} of {len(prompts)} prompts, the first {absent[0]:05d} "
            f"({prompts[absent[0]]['prompt']!r}); make them, or score with missing='official'"
        )


def write_results(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes judged images as the official results.jsonl, byte for byte, in the order of `rows`.

    Args:
        path: replaced atomically at the end; its folder is created if missing.
        rows: mappings with `RESULT_KEYS`; other keys are left out. "metadata" and "details" are JSON text, or values
            that are converted as in the official code.

    Raises:
        ValueError: a row lacks a key; names the row's number.
    """
    with replacing_text(path) as file:
        file.writelines(result_lines(rows))


def result_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of `write_results`, each with its newline.

    Raises:
        ValueError: see `write_results`.
    """
    for number, row in enumerate(rows, start=1):
        absent = [key for key in RESULT_KEYS if key not in row]
        if absent:
            raise ValueError(f"row {number} has no {', '.join(map(repr, absent))}; see eval.geneval.result_row")
        values = {key: row[key] for key in RESULT_KEYS} | {"correct": bool(row["correct"])}
        for key in ("metadata", "details"):
            values[key] = values[key] if isinstance(values[key], str) else json.dumps(values[key])
        yield _as_pandas(values) + "\n"


def _as_pandas(values: Mapping[str, Any]) -> str:
    """One JSON object as pandas writes it: no spaces, every slash escaped, DEL not escaped."""
    text = json.dumps(values, separators=(",", ":")).replace("/", "\\/")
    if "\\u007f" in text:  # rare; it may also be the text of an escape, whose backslash is escaped in turn
        text = re.sub(r"\\(u007f|.)", lambda match: "\x7f" if match[1] == "u007f" else match[0], text)
    return text


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Reads a results.jsonl, ours or the official one; "metadata" and "details" stay JSON text, as in the file.

    Raises:
        ValueError: the file is absent, or a line is not a judged image; names the line.
    """
    rows = []
    for number, row in read_json_lines(path):
        absent = [key for key in ("tag", "correct", "metadata") if not isinstance(row, dict) or key not in row]
        if absent:
            raise ValueError(f"{path}, line {number}: a judged image needs {', '.join(map(repr, absent))}")
        if not isinstance(row["correct"], bool):
            raise ValueError(f"{path}, line {number}: 'correct' is {row['correct']!r}; it must be true or false")
        rows.append(row)
    return rows
