"""A source that cannot be read, or a home that cannot be written, is one message, by `check` and in a workflow."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from own_images import png, write_tar

from tasks.artifacts import UserError
from tasks.curation import check
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.task import list_corpus
from tasks.planning.task import resolve_recipe

NOBODY = 65534


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """A folder that every user can write to; pytest's own are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        monkeypatch.setenv("NUCLEUS_HOME", f"{folder}/home")
        monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "false")
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def unprivileged(monkeypatch) -> Iterator[None]:
    """Runs the test without root's right to read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    import tasks.curation.flow  # noqa: F401  (while its files can be read)

    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def fifo(path: Path) -> Path:
    os.mkfifo(path / "images")
    return path / "images"


def link_to_a_fifo(path: Path) -> Path:
    (path / "link").symlink_to(fifo(path))
    return path / "link"


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path / "images"))
    return path / "images"


def circle(path: Path) -> Path:
    (path / "images").symlink_to("images")
    return path / "images"


def locked_image(path: Path) -> Path:
    (path / "a.png").write_bytes(png(0))
    return path / "a.png"


def locked_tar(path: Path) -> Path:
    return write_tar(path / "a.tar", range(2))


def locked_folder(path: Path) -> Path:
    (path / "images").mkdir()
    return path / "images"


SPECIAL = [fifo, link_to_a_fifo, unix_socket, circle, lambda path: Path("/dev/null"), lambda path: Path("/dev/zero")]
NAMES = ["fifo", "link to a fifo", "socket", "circle", "null", "zero"]


def refusals(source: str, capsys) -> list[str]:
    """What `check` prints, and the errors of the tasks that a workflow begins with."""
    capsys.readouterr()
    assert check.main([source]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and printed[0].startswith("ValueError: "), printed
    with pytest.raises(UserError) as error:
        sections = resolve_recipe.task_function(recipe="smoke", overrides=[], source=source, ends_in="pipeline")
        list_corpus.task_function(source=SourceConfig(), path=sections.source_path, made=[], config=CurationConfig())
    return [printed[0].removeprefix("ValueError: "), str(error.value)]


@pytest.mark.parametrize("make", SPECIAL, ids=NAMES)
def test_a_source_that_is_no_file_is_one_message_and_is_never_waited_for(make: Callable, place, capsys):
    source = str(make(place))
    for message in refusals(source, capsys):
        assert message.startswith(f"{source} cannot be read: ") and "\n" not in message


@pytest.mark.parametrize("make", [locked_image, locked_tar, locked_folder])
def test_a_source_without_the_right_to_read_it_is_one_message(make: Callable, place, unprivileged, capsys):
    source = make(place)
    source.chmod(0)
    for message in refusals(str(source), capsys):
        assert message.startswith(f"{source} cannot be read: Permission denied; grant the right to read it")
    source.chmod(0o700)


def test_an_empty_source_is_one_message(place, capsys):
    assert check.main([""]) == 1
    assert capsys.readouterr().out.startswith("ValueError: the source is ''; give a folder")


def a_file(home: Path) -> None:
    home.write_text("")


def below_a_file(home: Path) -> None:
    home.parent.write_text("")


def locked(home: Path) -> None:
    home.mkdir(parents=True)
    home.chmod(0o500)


@pytest.mark.parametrize(("make", "why"), [
    (a_file, "File exists"), (below_a_file, "Not a directory"), (locked, "Permission denied"),
])  # fmt: skip
def test_a_home_that_cannot_be_written_is_one_message_that_names_its_variable(
    make, why, place, unprivileged, capsys, monkeypatch
):
    home = place / "above" / "home" if make is below_a_file else place / "home"
    monkeypatch.setenv("NUCLEUS_HOME", str(home))
    make(home)
    for message in refusals(str(place), capsys):
        assert message.startswith(f"NUCLEUS_HOME={home}: artifacts cannot be written there ({why}); set NUCLEUS_HOME")
