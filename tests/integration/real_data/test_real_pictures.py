"""Real captioned pictures out of Debian packages, fetched for the test and never kept: curation loses none of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

from tasks.curation import check, flow
from tasks.curation.sources import base
from tasks.planning.sections import for_own_images
from tasks.recipe import load_recipe
from tasks.store import fetch_part

pytestmark = pytest.mark.slow


def unpacked(package: str, folder: Path) -> Path:
    """The files of a Debian package; skips where apt or its mirror is out of reach."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip(f"{package}: apt-get and dpkg are needed to fetch it")
    try:
        done = subprocess.run(
            ["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{package}: apt-get download took more than 300 s")
    archive = next(folder.glob(f"{package}_*.deb"), None)
    if done.returncode or archive is None:
        pytest.skip(f"{package}: apt-get download failed: {done.stderr.strip()[-200:]}")
    subprocess.run(["dpkg", "-x", archive, folder / "package"], check=True)
    return folder / "package"


def stamps(package: Path, out: Path) -> None:
    """Tux Paint's stamps (GPL-2) on white, 256 px, with the first line of their descriptions."""
    root = package / "usr/share/tuxpaint/stamps"
    for png in sorted(root.rglob("*.png")):
        note = png.with_suffix(".txt")
        if not note.exists() or "symbols" in png.parts:
            continue
        image = Image.open(png).convert("RGBA")
        if min(image.size) < 64:
            continue
        ground = Image.new("RGBA", [max(image.size) * 9 // 8] * 2, "white")
        ground.alpha_composite(image, tuple((g - i) // 2 for g, i in zip(ground.size, image.size, strict=True)))
        name = "-".join(png.relative_to(root).with_suffix("").parts)
        ground.convert("RGB").resize((256, 256)).save(out / f"{name}.png", compress_level=1)
        (out / f"{name}.txt").write_text(note.read_text("utf8").splitlines()[0])  # other languages follow


def emoji(package: Path, out: Path) -> None:
    """Noto's colour emoji (OFL) with their Unicode names."""
    font = ImageFont.truetype(next(package.rglob("NotoColorEmoji.ttf")), 109)  # its one bitmap size
    for code in [*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00)]:
        image = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        name = unicodedata.name(chr(code), None)
        if name and image.getcolors(4) is None:  # more than four colours: the font has it
            image.save(out / f"{code:x}.png", compress_level=1)
            (out / f"{code:x}.txt").write_text(name.lower())


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "draw", "at_least"), [("tuxpaint-stamps-default", stamps, 400), ("fonts-noto-color-emoji", emoji, 1000)]
)
def test_a_folder_of_real_pictures_is_accounted_for_whole(tmp_path, monkeypatch, package, draw, at_least):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "nucleus"))
    source = tmp_path / "source"
    source.mkdir()
    draw(unpacked(package, tmp_path), source)
    pictures = sorted(path.name for path in source.glob("*.png"))
    assert len(pictures) >= at_least
    recipe = for_own_images(load_recipe("smoke"))
    curated, decision = flow.curate_source(recipe.source, str(source), recipe.curation)
    directory = fetch_part(decision)
    account = json.loads((directory / base.REPORT).read_text())["account"]
    assert account["records"] == len(pictures) and not account["skipped"]
    assert account["seen"] == len(list(source.iterdir()))
    lines = list(check.fates(directory))
    assert sorted(line["file"] for line in lines) == pictures, "each picture is in the ledger once"
    for line in lines:
        owner = (source / line["file"]).with_suffix(".txt").read_text().strip()
        assert line["captions"] == [owner]
    kept = pq.read_table(curated / "ledger.parquet", columns=["kept"])["kept"].to_pylist()
    rejected = [line for line in lines if line["fate"] != "kept"]
    assert sum(kept) + len(rejected) == len(pictures) and sum(kept) > 0.9 * len(pictures), rejected
