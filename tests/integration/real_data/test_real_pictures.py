"""Real captioned pictures from Debian packages, downloaded for the test only: the command loses none of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont
from recipe_home import Home

from tasks.curation import check
from tasks.curation.sources import base
from tasks.encoding import ledger as encoding_ledger
from tasks.manifest import verify
from tasks.trace import walk

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
def test_the_whole_command_on_real_pictures_loses_none(tmp_path, monkeypatch, package, draw, at_least):
    source = tmp_path / "source"
    source.mkdir()
    draw(unpacked(package, tmp_path), source)
    pictures = sorted(path.name for path in source.glob("*.png"))
    assert len(pictures) >= at_least
    home = Home(tmp_path / "home")
    monkeypatch.setenv("NUCLEUS_HOME", str(home.path / "nucleus"))  # where `fates` looks
    made = home.outputs(home.run("--recipe", "smoke", "--source", str(source), timeout_s=3600))
    nodes = list(walk(made["pipeline"]).values())

    (decision,) = [path.parent for path in (home.artifacts / "decisions").glob("*/ledger.parquet")]
    account = json.loads((decision / base.REPORT).read_text())["account"]
    assert account["records"] == len(pictures) and not account["skipped"]
    assert account["seen"] == len(list(source.iterdir()))
    lines = list(check.fates(decision))
    assert sorted(line["file"] for line in lines) == pictures, "each picture is in the ledger once"
    for line in lines:
        owner = (source / line["file"]).with_suffix(".txt").read_text().strip()
        assert line["captions"] == [owner]
    ledger = pq.read_table(made["curated"] / "ledger.parquet").to_pandas()
    kept = int(ledger["kept"].sum())
    assert sorted(ledger["file"]) == pictures and (ledger["kept"] == (ledger["rule"] == "")).all()
    # Hearts of other colours and clocks of other hours are near duplicates: 102 of the 1,280 emoji.
    assert kept > 0.9 * len(pictures), ledger["rule"].value_counts()

    encoded = [node for node in nodes if node.manifest.kind in ("texts", "latents")]
    reports = {node.path: json.loads((Path(node.path) / "report.json").read_text()) for node in encoded}
    wholes = {path: report for path, report in reports.items() if report["records"] == kept}
    assert len({report.get("image_size_px") for report in wholes.values()}) == 4, "texts, and latents of three stages"
    for path, report in wholes.items():
        outcomes = encoding_ledger.outcomes(report)
        assert sum(outcomes.values()) == kept and outcomes["encoded"] > 0
        assert set(outcomes) <= {"encoded", "held_out", "not_drawn", *encoding_ledger.RULES}
        named = pq.read_table(Path(path) / "encoding_ledger.parquet", columns=["rule"])["rule"].to_pylist()
        rejected = sum(count for rule, count in outcomes.items() if rule in encoding_ledger.RULES)
        assert sum(map(bool, named)) == rejected, "what a rule leaves out is named"
    for output in ("pipeline", "scorecard"):
        verify(made[output])
    assert (made["pipeline"] / "model_index.json").is_file() and (made["scorecard"] / "scorecard.html").is_file()
