"""Progress is logged; only commands and results of a task are printed."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from model import logs

ROOT = Path(__file__).resolve().parents[2]
# Print their result, which a run shows whatever the log level is.
RESULTS = {
    "tasks/evaluation/task.py",
    "tasks/evaluation/evaluate.py",
    "tasks/publishing/task.py",
    "tasks/study/task.py",
}


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(logs, "ROOT", "nucleus-under-test")
    yield
    logging.getLogger("nucleus-under-test").handlers.clear()


def test_a_line_is_written_as_it_is_to_the_standard_output_of_the_moment(fresh, capsys):
    logs.get_logger("tasks.a").info("source: 3 images, 50% of them square")
    assert capsys.readouterr().out == "source: 3 images, 50% of them square\n"
    logs.get_logger("tasks.b").warning("shard 7 failed")
    assert capsys.readouterr().out == "shard 7 failed\n"


def test_the_level_of_the_environment_keeps_warnings(fresh, capsys, monkeypatch):
    monkeypatch.setenv("NUCLEUS_LOG_LEVEL", "warning")
    logger = logs.get_logger("tasks.a")
    logger.info("step 1")
    logger.warning("shard 7 failed")
    assert capsys.readouterr().out == "shard 7 failed\n"


def _prints(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in ast.walk(tree))


def _is_command(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_library_code_logs_its_progress():
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in ("model", "tasks", "eval", "workflows")
        for path in (ROOT / package).rglob("*.py")
    }
    trees = {name: ast.parse(text) for name, text in texts.items() if "print(" in text}
    printing = {name for name, tree in trees.items() if _prints(tree) and not _is_command(tree)}
    assert printing - RESULTS == set(), "log with model.logs.get_logger"
