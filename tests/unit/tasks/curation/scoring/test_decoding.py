"""From bytes to pixels: colours are sRGB's, big JPEGs are decoded small where few pixels are needed, scans have a limit."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from icc_profiles import DISPLAY_P3, SRGB, gray_profile, rgb_profile
from PIL import Image, ImageCms, ImageOps
from score_tables import good_row, records_of

from tasks.curation.config import CurationConfig, FilterConfig
from tasks.curation.scoring import decoding
from tasks.curation.scoring.decoding import decode, inspect, inspect_and_decode
from tasks.curation.scoring.score import measure
from tasks.curation.scoring.workers import CrashError, Workers

P3 = rgb_profile(DISPLAY_P3)
MILLION = 10**6


def colors(side: int = 96) -> Image.Image:
    """Every hue, from black to white."""
    y, x = np.mgrid[0:side, 0:side] * (255 / (side - 1))
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], axis=-1).astype(np.uint8))


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def to_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def by_image_cms(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    return levels(ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- colour ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_display_p3_becomes_srgb_as_image_cms_makes_it(form):
    data = to_bytes(colors(), form, icc_profile=P3)
    plain = levels(Image.open(io.BytesIO(data)).convert("RGB"))
    want = by_image_cms(data)
    assert np.abs(want - plain).max() > 20, "the picture does not depend on its profile"
    assert np.abs(levels(decode(data, MILLION)) - want).max() <= 2


def test_curation_measures_the_colours_that_encoding_trains_on():
    data = to_bytes(colors(), icc_profile=P3)
    rgb = np.frombuffer(measure(data, CurationConfig()).rgb, np.uint8)
    assert np.array_equal(rgb, np.asarray(decode(data, MILLION)).ravel())


def test_transparency_is_laid_over_white_in_srgb():
    image = colors().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 128))
    image.paste((255, 0, 0, 0), (0, 0, 10, 10))
    pixels = levels(decode(to_bytes(image, icc_profile=P3), MILLION))
    inside = by_image_cms(to_bytes(colors(), icc_profile=P3))
    assert (pixels[:10, :10] == 255).all()
    assert np.abs(pixels[20:, 20:] - (inside[20:, 20:] * 128 + 255 * 127) / 255).max() <= 3


@pytest.mark.parametrize("image", [colors().convert("L"), colors().convert("LA"), Image.fromarray(np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64))], ids=["L", "LA", "I;16"])  # fmt: skip
def test_a_gray_profile_is_applied(image):
    linear = levels(decode(to_bytes(image, icc_profile=gray_profile(1.0)), MILLION))
    plain = levels(decode(to_bytes(image), MILLION))
    assert (linear[..., 0] == linear[..., 1]).all()
    want = np.interp(plain / 255, *_srgb_curve()) * 255
    assert np.abs(linear - want)[plain > 8].max() <= 3 and np.abs(linear - plain).max() > 50


def _srgb_curve():
    encoded = np.linspace(0, 1, 2001)
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4), encoded


def test_a_gray_jpeg_with_a_profile_of_colours_keeps_the_profile_s_curve():
    data = to_bytes(colors().convert("L"), "JPEG", icc_profile=rgb_profile(SRGB, 1.0))
    assert np.abs(levels(decode(data, MILLION)) - levels(decode(to_bytes(colors().convert("L"), "JPEG"), MILLION))).max() > 50  # fmt: skip


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"rubbish",
        b"rubbish" * 100,
        P3[:300],
        P3[:16] + b"CMYK" + P3[20:],
        P3[:16] + b"GRAY" + P3[20:],
        P3 + bytes(decoding.MAX_PROFILE_BYTES),
    ],
    ids=["sRGB", "short", "rubbish", "cut off", "CMYK", "gray", "too large"],
)
def test_a_profile_of_srgb_and_one_that_cannot_be_used_change_nothing(profile):
    data = to_bytes(colors(), "TIFF", icc_profile=profile)
    assert np.array_equal(levels(decode(data, MILLION)), levels(colors()))


def test_a_profile_is_read_once_for_many_pictures(monkeypatch):
    decoding._of_profile.cache_clear()
    made = []
    build = ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: made.append(1) or build(*args))
    for seed in range(5):
        decode(to_bytes(ImageOps.solarize(colors(), 50 * seed), icc_profile=P3), MILLION)
    assert len(made) == 1


# --- few pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize(("size", "decoded"), [((1600, 1000), (800, 500)), ((4000, 1600), (1000, 400)), ((760, 900), (760, 900))])  # fmt: skip
def test_a_large_jpeg_is_decoded_small_where_few_pixels_are_needed(size, decoded, options):
    data = to_bytes(photo(*size), "JPEG", quality=90, **options)
    header, small = inspect_and_decode(data, 10 * MILLION, ("JPEG",), min_side_px=384)
    assert (header.width, header.height) == size and small.size == decoded
    whole = decode(data, 10 * MILLION)
    assert whole.size == size
    assert np.abs(levels(small) - levels(whole.resize(decoded, Image.Resampling.BOX))).mean() < 1.5
    assert decode(data, 10 * MILLION, min_side_px=384).tobytes() == small.tobytes()


def test_a_rotated_jpeg_that_is_decoded_small_keeps_its_shape():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(photo(1600, 1000), "JPEG", exif=exif)
    header, small = inspect_and_decode(data, 10 * MILLION, ("JPEG",), min_side_px=384)
    assert (header.width, header.height, header.orientation) == (1000, 1600, 6) and small.size == (500, 800)


def test_columns_of_size_are_those_of_the_whole_image():
    config = CurationConfig()
    data = to_bytes(photo(1600, 1000), "JPEG")
    columns = measure(data, config).columns
    assert (columns["width"], columns["height"]) == (1600, 1000)
    assert columns["bytes_per_pixel"] == pytest.approx(len(data) / 1_600_000)


def test_an_orientation_behind_the_pixels_of_a_png_counts_in_the_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(photo(160, 96), exif=exif)
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    late = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    assert inspect(late).orientation == 1
    header, image = inspect_and_decode(late, MILLION, ("PNG",))
    assert (header.width, header.height) == image.size == (96, 160)


# --- limits ----------------------------------------------------------------------------------------------------


def with_more_scans(count: int) -> bytes:
    """A progressive JPEG with its last scan repeated `count` times."""
    data = to_bytes(photo(640, 480), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def test_a_jpeg_of_200_more_scans_is_refused_within_10_ms():
    data, took = with_more_scans(200), []
    for _ in range(5):
        begun = time.perf_counter()
        with pytest.raises(decoding.UndecodableError, match="more than 50 scans"):
            decode(data, MILLION)
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.010
    assert measure(data, CurationConfig()).columns["error_rule"] == "undecodable"


def test_as_many_scans_as_encoders_write_are_read():
    assert decode(with_more_scans(8), MILLION).size == (640, 480)


def take(data: bytes) -> int:
    return len(bytearray(int(data)))


def test_a_worker_that_takes_too_much_memory_costs_one_result():
    items = [b"1000", b"900000000", b"2000"]
    with Workers(take, 1, memory_bytes=500 * 2**20) as workers:
        results = [result for _, result in workers.map(enumerate(items))]
    assert results[::2] == [1000, 2000]
    assert isinstance(results[1], CrashError) and str(results[1]) == "the image needs over 500 MiB to decode"


@pytest.mark.slow
@pytest.mark.parametrize("limit, count", [(f"{1500 * 2**20}", 2), (f"{100 * 2**20}", 1), ("max", 4)])
def test_a_small_container_has_fewer_workers_and_what_each_can_decode_stays_the_same(
    tmp_path, monkeypatch, limit, count
):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr("tasks.curation.scoring.workers.CONTAINER_LIMIT", tmp_path / "memory.max")
    with Workers(take, 4, memory_bytes=500 * 2**20) as workers:
        results = [result for _, result in workers.map(enumerate([b"300000000"] * 6))]
        assert len(workers._workers) == count
    assert results == [300_000_000] * 6


# --- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF", "AVIF"])
def test_the_first_frame_of_an_animation_is_what_is_kept_by_choice(form):
    frames = [photo(160, 96), ImageOps.invert(photo(160, 96))]
    options = {} if form in ("GIF", "AVIF") else {"lossless": True}
    data = to_bytes(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert inspect(data).animated
    assert np.abs(levels(decode(data, MILLION)) - levels(frames[0])).mean() < 12


def test_animations_are_refused_or_not_by_the_recipe_alone():
    rows = [good_row(0, animated=True), good_row(1, animated=False)]
    frames = CurationConfig(filters=FilterConfig(animated="first_frame"))
    assert [row["rule"] for row in records_of(rows, CurationConfig())] == ["animated", ""]
    assert [row["rule"] for row in records_of(rows, frames)] == ["", ""]
    assert frames.scoring() == CurationConfig().scoring(), "no image is decoded again for another choice"


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_avif_and_heic_are_read_with_their_colours_and_orientation(form):
    if form == "HEIF":
        pytest.importorskip("pillow_heif")
    assert form in decoding.decodable()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(photo(160, 96), form, quality=95, icc_profile=P3, exif=exif)
    # HEIF's own rotation counts, which libheif applies; pillow-heif writes none, and EXIF's is ignored, as HEIF says.
    size = (96, 160) if form == "AVIF" else (160, 96)
    header, image = inspect_and_decode(data, MILLION, (form,))
    assert (header.format, header.animated, header.width, header.height) == (form, False, *size)
    assert image.size == size
    transform = ImageCms.buildTransform(io.BytesIO(P3), ImageCms.createProfile("sRGB"), "RGB", "RGB")
    want = transform.apply(photo(160, 96))
    if form == "AVIF":
        want = want.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(levels(image) - levels(want)).mean() < 5  # 13 without the profile; half the colours are stored


def test_a_heic_is_a_picture_of_a_source_with_pillow_heif():
    pytest.importorskip("pillow_heif")
    from tasks.curation.sources.base import is_image

    assert is_image("IMG_0.HEIC") and is_image("a.heif") and not is_image("a.jxl")


QUIET = """
import io, struct, threading, warnings
from PIL import Image
from tasks.curation.scoring.decoding import decode
from tasks.curation.scoring.workers import Workers

def with_tags_over_the_file() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    data = buffer.getvalue()
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = data[at + 2 : at + 2 + 12 * count]
    entries += b"".join(struct.pack("<HHII", 40_000 + i, 1, 2**31, 0) for i in range(1000))
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count + 1000) + entries + bytes(4)

DATA = with_tags_over_the_file()
SAMPLES = DATA.replace(struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 99))
assert SAMPLES != DATA

def tiff(compression: int, width: int, height: int, data: bytes, *more: tuple[int, int]) -> bytes:
    tags = [(256, width), (257, height), (258, 1), (259, compression), *more, (262, 0), (273, 0), (277, 1), (278, height), (279, len(data))]
    start = 10 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return b"II*" + struct.pack("<xIH", 8, len(tags)) + entries + bytes(4) + data

def look(data: bytes):
    try:
        return decode(data, 8_000_000).size
    except ValueError as error:
        return str(error)

for fax in (2, 3, 4, 32771):
    damaged = tiff(fax, 8, 1_000_000, bytes(range(40)))
    assert "a TIFF with CCITT" in look(damaged), look(damaged)
    assert look(tiff(fax, 8, 1_000_000, bytes(range(40)), (259, 8))) == "corrupt TIFF: it names its compression twice"

with Workers(look, 1) as workers:
    (_, one), (_, other) = workers.map(enumerate([DATA, SAMPLES]))
assert one == (8, 8) and "no image of a format that is read" in other
with warnings.catch_warnings():
    threads = [threading.Thread(target=look, args=(DATA,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
assert look(DATA) == (8, 8)  # now that what was set among `catch_warnings` is gone
"""


def test_no_image_writes_to_the_log():
    """Neither in a worker, nor in threads, as encoding decodes; whatever other code does to the filters of warnings."""
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout + done.stderr == ""
