import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps
from score_tables import good_row, records_of

from tasks.curation.config import CurationConfig, FilterConfig, ScorerConfig
from tasks.curation.scorers import SCALARS, build_scorer, chosen_scorers
from tasks.curation.scorers.classical import watermark_score
from tasks.curation.scoring import decoding, filters
from tasks.curation.scoring.score import measure, score_record
from tasks.curation.sources.base import Record

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05))


def scene(width=128, height=128, color="red", at=(40, 40, 90, 90)) -> Image.Image:
    image = Image.new("RGB", (width, height), (250, 250, 250))
    ImageDraw.Draw(image).ellipse(at, fill=color)
    return image


def busy(width=160, height=96, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def to_bytes(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header has width x height pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def verdicts(files: list[bytes], config: CurationConfig = CONFIG) -> list[tuple[str, str]]:
    """(rule, detail) of each record."""
    scorers = [build_scorer(one) for one in chosen_scorers(config.scorers)]
    rows = []
    for i, data in enumerate(files):
        row, sample = score_record(Record(f"k{i}", data, "png", ["a circle"], "user", f"{i}.png", i), config)
        for scorer in scorers if sample is not None else ():
            row |= {column: float(values[0]) for column, values in scorer([sample]).items()}
        rows.append(dict.fromkeys(SCALARS, float("nan")) | row | {"part": 0})
    return [(decided["rule"], decided["detail"]) for decided in records_of(rows, config)]


def verdict(data: bytes, config: CurationConfig = CONFIG) -> tuple[str, str]:
    (result,) = verdicts([data], config)
    return result


# --- decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind, share):
    data = to_bytes(busy(), kind)
    assert decoding.decode(data, 10**6).size == (160, 96)
    with pytest.raises(ValueError):
        decoding.decode(data[: int(share * len(data))], 10**6)


def test_a_jpeg_without_its_last_bytes_is_refused_though_libjpeg_would_take_it():
    data = to_bytes(busy(), "JPEG")
    with pytest.raises(decoding.UndecodableError, match="truncated JPEG"):
        decoding.decode(data[:-2], 10**6)


def test_a_jpeg_with_overwritten_scan_data_is_refused():
    data = bytearray(to_bytes(busy(320, 320), "JPEG", quality=95))
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8).tobytes()
    with pytest.raises(decoding.UndecodableError, match="corrupt JPEG|does not decode"):
        decoding.decode(bytes(data), 10**6)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"restart_marker_rows": 1}, {"quality": 10}, {"exif": b"Exif\0\0"}]
)
def test_sound_jpegs_of_every_make_decode(options):
    assert decoding.decode(to_bytes(busy(), "JPEG", **options), 10**6).size == (160, 96)


@pytest.mark.parametrize("data", [b"", b"hello", b"<html></html>" * 99, b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(decoding.UndecodableError):
        decoding.decode(data, 10**6)


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 12_000), (2_000, 1_000)])
def test_a_bomb_is_refused_by_its_header_before_a_pixel_is_decoded(size, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(decoding.TooManyPixelsError):
        decoding.decode(png_header(*size), 10**6)
    assert verdict(png_header(*size), CurationConfig(filters=FilterConfig(max_pixels=10**6)))[0] == "too_many_pixels"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_made_real_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = to_bytes(busy(), kind, exif=exif)
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(decoding.decode(data, 10**6)), np.asarray(want.convert("RGB")))
        columns = measure(data, CONFIG).columns
        assert (columns["width"], columns["height"]) == want.size
        assert columns["orientation"] == orientation
        header = decoding.inspect(data)
        assert (header.width, header.height, header.orientation) == (*want.size, orientation)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    pixels = np.asarray(decoding.decode(to_bytes(image.convert(mode)), 10**6))
    assert (pixels[:, 30] == 255).all() and (pixels[:, 10] == 0).all()


def test_half_transparent_pixels_are_mixed_with_white():
    data = to_bytes(Image.new("RGBA", (40, 40), (0, 0, 0, 128)))
    assert abs(int(np.asarray(decoding.decode(data, 10**6))[0, 0, 0]) - 127) <= 1


RAMP16 = np.linspace(0, 65535, 40 * 40).round().astype(np.uint16).reshape(40, 40)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grayscale_is_scaled_to_eight_and_goes_on(kind):
    data = to_bytes(Image.fromarray(RAMP16), kind)
    assert decoding.inspect(data).mode == "L"
    pixels = np.asarray(decoding.decode(data, 10**6))
    assert np.array_equal(pixels, np.repeat(np.rint(RAMP16 / 257)[..., None], 3, axis=2))
    every_format = CONFIG.filters.model_copy(update={"formats": decoding.DECODABLE})
    assert verdict(data, CONFIG.model_copy(update={"filters": every_format}))[0] == ""


def test_a_big_endian_and_an_inverted_tiff_of_sixteen_bits_have_the_right_levels():
    want = np.rint(RAMP16 / 257)
    swapped = to_bytes(Image.fromarray(RAMP16.astype(">u2")), "TIFF")
    assert np.array_equal(np.asarray(decoding.decode(swapped, 10**6))[..., 0], want)
    inverted = to_bytes(Image.fromarray(RAMP16), "TIFF", tiffinfo={decoding.PHOTOMETRIC: decoding.WHITE_IS_ZERO})
    assert np.array_equal(np.asarray(decoding.decode(inverted, 10**6))[..., 0], 255 - want)


def test_a_transparent_level_of_sixteen_bits_is_laid_over_white():
    values = np.full((40, 40), 300, np.uint16)
    values[:, 20:] = 301  # the same 8 bits
    pixels = np.asarray(decoding.decode(to_bytes(Image.fromarray(values), transparency=300), 10**6))
    assert (pixels[:, :20] == 255).all() and (pixels[:, 20:] == 1).all()


def test_pixels_without_a_known_range_are_refused_rather_than_clipped():
    data = to_bytes(Image.fromarray(np.full((40, 40), 40_000, np.int32)), "TIFF")
    with pytest.raises(decoding.UndecodableError, match="mode I "):
        decoding.decode(data, 10**6)


# --- statistics ------------------------------------------------------------------------------------------------


def test_statistics_of_known_pictures():
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 200
    assert filters.entropy_bits(half[..., 0]) == pytest.approx(1.0)
    assert filters.single_color_fraction(half) == pytest.approx(0.5)
    assert filters.entropy_bits(np.full((8, 8), 7, np.uint8)) == 0
    assert filters.entropy_bits(np.arange(256, dtype=np.uint8).reshape(16, 16)) == pytest.approx(8.0)
    noise = np.random.default_rng(0).normal(128, 2, (64, 64, 3)).round().astype(np.uint8)
    assert filters.single_color_fraction(noise) > 0.99  # though it lies on the edge of histogram cells


@pytest.mark.parametrize("bars", [(0, 60, 0, 60), (80, 0, 80, 0), (50, 50, 50, 50)])
@pytest.mark.parametrize("color", ["black", "white"])
def test_bars_around_a_picture_are_measured(bars, color):
    picture = busy(160, 96)
    framed = ImageOps.expand(picture, bars, color)
    want = 1 - 160 * 96 / (framed.width * framed.height)
    assert filters.border_fraction(np.asarray(framed)) == pytest.approx(want, abs=0.05)
    as_jpeg = decoding.decode(to_bytes(framed, "JPEG", quality=85), 10**6)
    assert filters.border_fraction(np.asarray(as_jpeg)) == pytest.approx(want, abs=0.05)
    assert filters.border_fraction(np.asarray(picture)) == 0


def test_the_ground_around_drawn_objects_is_no_border():
    square = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(square).rectangle((50, 60, 90, 100), fill="blue")
    two = square.copy()
    ImageDraw.Draw(two).rectangle((5, 60, 44, 100), fill="red")
    for image in (scene(), square, two, scene(at=(2, 2, 60, 60))):
        assert filters.border_fraction(np.asarray(image)) == 0


# --- watermark -------------------------------------------------------------------------------------------------


def watermarked(image: Image.Image, gray: int, alpha: float, angle: int, size: int) -> Image.Image:
    width, height = image.size
    ink = Image.new("L", (2 * width, 2 * height), 0)
    draw, font = ImageDraw.Draw(ink), ImageFont.load_default(size)
    for row, y in enumerate(range(0, 2 * height, 2 * size)):
        for x in range(-10 * (row % 3), 2 * width, 5 * size):
            draw.text((x, y), "SAMPLE", fill=255, font=font)
    ink = ink.rotate(angle).crop((width // 2, height // 2, width // 2 + width, height // 2 + height))
    image = image.copy()
    image.paste((gray,) * 3, (0, 0), ink.point(lambda v: int(v * alpha)))
    return image


def gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


@pytest.mark.parametrize("ink", [0, 90, 128])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
@pytest.mark.parametrize("angle", [0, 30])
@pytest.mark.parametrize("size", [10, 16])
def test_repeated_faint_text_is_seen(ink, alpha, angle, size):
    marked = watermarked(scene(), ink, alpha, angle, size)
    assert watermark_score(gray(marked)) > 0.5
    assert watermark_score(gray(decoding.decode(to_bytes(marked, "JPEG", quality=75), 10**6))) > 0.5


def test_clean_pictures_noise_and_blur_have_no_watermark():
    rng = np.random.default_rng(0)
    clean = [scene(), scene(color="yellow", at=(10, 20, 40, 50)), busy(), Image.new("RGB", (128, 128), "gray")]
    for image in clean:
        for again in (image, decoding.decode(to_bytes(image, "JPEG", quality=50), 10**6)):
            assert watermark_score(gray(again)) == 0
        noisy = np.clip(np.asarray(image) + rng.normal(0, 3, np.asarray(image).shape), 0, 255).astype(np.uint8)
        assert watermark_score(gray(Image.fromarray(noisy))) < 0.2


@pytest.mark.slow
def test_every_digit_scan_passes_every_filter():
    from sklearn.datasets import load_digits

    files = []
    for scan in load_digits().images[::20]:
        for ink in (scan, 16 - scan):
            small = Image.fromarray(np.uint8(ink * 255 / 16))
            files.append(to_bytes(small.resize((128, 128), Image.Resampling.BICUBIC)))
    assert verdicts(files) == [("", "")] * len(files)


# --- deciding --------------------------------------------------------------------------------------------------


def animation() -> bytes:
    return to_bytes(busy(64, 64), "WEBP", save_all=True, append_images=[busy(64, 64, seed=1)])


@pytest.mark.parametrize(
    ("rule", "data", "fields"),
    [
        ("", to_bytes(scene()), {}),
        ("", to_bytes(busy(), "JPEG"), {}),
        ("too_many_pixels", to_bytes(scene()), {"max_pixels": 1000}),
        ("undecodable", b"nothing", {}),
        ("undecodable", to_bytes(scene(), "JPEG")[:700], {}),
        ("format", to_bytes(busy(), "GIF"), {}),
        ("mode", to_bytes(busy().convert("CMYK"), "JPEG"), {}),
        ("animated", animation(), {}),
        ("min_side", to_bytes(busy(160, 24)), {}),
        ("aspect_ratio", to_bytes(busy(320, 64)), {}),
        ("bytes_per_pixel", to_bytes(scene(), "PNG"), {"min_bytes_per_pixel": 0.5}),
        ("single_color", to_bytes(Image.new("RGB", (64, 64), "teal")), {}),
        ("low_entropy", to_bytes(scene()), {"min_entropy_bits": 2.0}),
        ("border", to_bytes(ImageOps.expand(busy(), 80, "black")), {}),
        ("watermark", to_bytes(watermarked(scene(), 90, 0.5, 20, 14)), {}),
        ("aesthetic", to_bytes(scene()), {"min_aesthetic": 9.9}),
    ],
)
def test_each_rule_rejects_what_it_names(rule, data, fields):
    config = CONFIG.model_copy(update={"filters": CONFIG.filters.model_copy(update=fields)})
    result, detail = verdict(data, config)
    assert result == rule
    assert bool(detail) == bool(rule)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_a_format_that_the_recipe_rejects_is_not_decoded(kind, monkeypatch):
    data = to_bytes(busy(), kind)
    monkeypatch.setattr(decoding, "_decode", None)
    assert verdict(data)[0] == "format"


def decided(filters: FilterConfig, **columns) -> list[tuple[str, str]]:
    """(rule, detail) of good records with these columns changed."""
    rows = [good_row(i, **dict(zip(columns, values))) for i, values in enumerate(zip(*columns.values(), strict=True))]
    return [(row["rule"], row["detail"]) for row in records_of(rows, CurationConfig(filters=filters))]


def rules_of(filters: FilterConfig, **columns) -> list[str]:
    return [rule for rule, _ in decided(filters, **columns)]


def test_the_models_scores_decide_by_their_thresholds_and_missing_ones_reject_nothing():
    config = FilterConfig(max_nsfw=0.5, min_image_text_similarity=0.2)
    result = rules_of(config, nsfw=[0.9, 0.1, np.nan, None], similarity=[0.3, 0.05, 0.3, np.nan])
    assert result == ["nsfw", "image_text_similarity", "", ""]


def test_the_first_broken_rule_is_named():
    result = rules_of(FilterConfig(), width=[10, 512], entropy_bits=[0.0, 0.0], nsfw=[1.0, 1.0])
    assert result == ["min_side", "low_entropy"]


def test_a_threshold_is_still_good():
    assert rules_of(FilterConfig(min_entropy_bits=0.5), entropy_bits=[0.5, 0.4999]) == ["", "low_entropy"]


def test_the_sentence_has_the_value_and_the_limit():
    result = decided(FilterConfig(formats=("PNG",)), format=["PNG", "it's"], entropy_bits=[0.123456, 5.0])
    assert result == [
        ("low_entropy", "entropy_bits 0.1235 is under min_entropy_bits 0.5"),
        ("format", "it's is not one of PNG"),
    ]


def test_a_problem_of_the_source_comes_before_every_other_rule():
    problems = {"problem": ["unreadable_caption", ""], "problem_detail": ["a.txt is not UTF-8", ""]}
    result = decided(FilterConfig(), **problems, width=[1, 512])
    assert result == [("unreadable_caption", "a.txt is not UTF-8"), ("", "")]


def test_a_scorer_that_does_not_exist_is_refused_by_name():
    with pytest.raises(
        ValueError, match="curation.scorers.nsfw='clip' is unknown; use one of none, open-nsfw, nsfw-classifier"
    ):
        chosen_scorers(ScorerConfig(nsfw="clip"))
    with pytest.raises(ValueError, match="curation.scorers.watermark='clasical' is unknown; did you mean 'classical'?"):
        chosen_scorers(ScorerConfig(watermark="clasical"))


@pytest.mark.slow
def test_a_scorer_is_imported_only_where_a_recipe_names_it():
    code = (
        "import sys; from tasks.curation.scorers import build_scorer, chosen_scorers\n"
        "from tasks.curation.config import ScorerConfig\n"
        "chosen = chosen_scorers(ScorerConfig(watermark='none'))\n"
        "assert 'tasks.curation.scorers.classical' not in sys.modules\n"
        "build_scorer(chosen[0])\n"
        "assert 'tasks.curation.scorers.classical' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>403</html>", "a web page instead of the image"),
    ],
)
def test_files_that_are_not_images_have_their_own_reasons(data, why):
    with pytest.raises(ValueError, match=why):
        decoding.inspect(data)
