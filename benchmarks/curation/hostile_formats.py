from __future__ import annotations
import io, struct, zlib
from hostile_images import image, _encoded, _plain, _png, _chunk
from hostile_inputs import MIB
from PIL import Image

CAP = 250 * MIB

@image("refused or read")
def x_gif_of_comments() -> bytes:
    data = _encoded(_plain("P", (64, 64)), "GIF")
    at = data.index(b"\x2c", 13)
    comment = b"\x21\xfe\xff" + b"a" * 255 + b"\0"
    return data[:at] + comment * (100 * MIB // len(comment)) + data[at:]

@image("refused or read")
def x_gif_of_tiny_comments() -> bytes:
    data = _encoded(_plain("P", (64, 64)), "GIF")
    at = data.index(b"\x2c", 13)
    comment = b"\x21\xfe\x01a\0"
    return data[:at] + comment * (CAP // len(comment)) + data[at:]

@image("refused or read")
def x_gif_of_subblocks() -> bytes:
    data = _encoded(_plain("P", (64, 64)), "GIF")
    at = data.index(b"\x2c", 13)
    return data[:at] + b"\x21\xfe" + b"\x01a" * (CAP // 2) + b"\0" + data[at:]

@image("refused or read")
def x_gif_of_extensions() -> bytes:
    data = _encoded(_plain("P", (64, 64)), "GIF")
    at = data.index(b"\x2c", 13)
    return data[:at] + b"\x21\x01\0" * (CAP // 3) + data[at:]

@image("refused or read")
def x_gif_of_frames() -> bytes:
    first = _encoded(_plain("P", (8, 8)), "GIF")
    at = first.index(b"\x2c", 13)
    return first[:-1] + first[at:-1] * (60 * MIB // len(first[at:-1])) + b"\x3b"

@image("refused or read")
def x_tiff_of_directories() -> bytes:
    """a chain of 5 million IFDs"""
    base = _encoded(_plain("L", (8, 8)), "TIFF")
    order = base[:2]; off = struct.unpack("<I", base[4:8])[0]
    n = struct.unpack("<H", base[off:off+2])[0]
    out = bytearray(base); nextat = off + 2 + 12 * n
    count = 2_000_000
    tags = struct.pack("<HHII", 256, 3, 1, 8) 
    start = len(out) + len(out) % 2
    out += b"\0" * (len(out) % 2)
    struct.pack_into("<I", out, nextat, start)
    body = bytearray()
    for i in range(count):
        here = start + i * 18
        body += struct.pack("<H", 1) + tags + struct.pack("<I", here + 18 if i < count - 1 else 0)
    return bytes(out + body)

@image("refused or read")
def x_tiff_loop_of_directories() -> bytes:
    base = bytearray(_encoded(_plain("L", (8, 8)), "TIFF"))
    off = struct.unpack("<I", base[4:8])[0]
    n = struct.unpack("<H", base[off:off+2])[0]
    struct.pack_into("<I", base, off + 2 + 12 * n, off)
    return bytes(base)

def _tiff(tags: list[tuple[int, int, int, bytes]], tail: bytes = b"", big=False) -> bytes:
    tags = sorted(tags)
    out = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)))
    at = 8 + 2 + 12 * len(tags) + 4
    later = bytearray()
    for tag, kind, count, value in tags:
        if len(value) <= 4:
            out += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            out += struct.pack("<HHII", tag, kind, count, at + len(later)); later += value
    return bytes(out + b"\0\0\0\0" + later + tail)

def _basic(width, height, strips, offset):
    return [(256, 4, 1, struct.pack("<I", width)), (257, 4, 1, struct.pack("<I", height)), (258, 3, 1, struct.pack("<H", 8)),
        (259, 3, 1, struct.pack("<H", 1)), (262, 3, 1, struct.pack("<H", 1)), (277, 3, 1, struct.pack("<H", 1)),
        (278, 4, 1, struct.pack("<I", 1))]

@image("refused or read")
def x_tiff_of_strips() -> bytes:
    """10 million strips of one pixel."""
    count = 10_000_000
    tags = _basic(1, count, count, 0)
    tags += [(273, 4, count, struct.pack("<I", 8) * count), (279, 4, count, struct.pack("<I", 1) * count)]
    return _tiff(tags)

@image("refused or read")
def x_tiff_of_million_strips() -> bytes:
    count = 1_000_000
    tags = _basic(1, count, count, 0)
    tags += [(273, 4, count, struct.pack("<I", 8) * count), (279, 4, count, struct.pack("<I", 1) * count)]
    return _tiff(tags)

@image("refused or read")
def x_tiff_of_large_tags() -> bytes:
    """60,000 tags that each read the same 240 MB"""
    blob = bytes(200 * MIB)
    tags = _basic(8, 8, 1, 0)
    n = 60_000
    all_tags = sorted([*tags, (273, 4, 1, struct.pack("<I", 8)), (279, 4, 1, struct.pack("<I", 64))])
    at = 8 + 2 + 12 * (len(all_tags) + n) + 4
    out = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(all_tags) + n))
    for tag, kind, count, value in all_tags:
        out += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    for i in range(n):
        out += struct.pack("<HHII", 1000 + i, 7, len(blob), at)
    return bytes(out + b"\0\0\0\0") + blob

@image("refused or read")
def x_png_exif_of_tags() -> bytes:
    """eXIf with 60,000 tags that point to the same 100 MB"""
    blob = bytes(100 * MIB); n = 60_000
    at = 8 + 2 + 12 * n + 4
    out = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", n))
    for i in range(n):
        out += struct.pack("<HHII", 0x112 if not i else 1000 + i, 7, len(blob), at)
    return _png(64, 64, _chunk(b"eXIf", bytes(out + b"\0\0\0\0") + blob))

@image("refused or read")
def x_png_exif_of_numbers() -> bytes:
    """eXIf: one tag of 25 million shorts, 1000 times"""
    blob = bytes(100 * MIB); n = 1000
    at = 8 + 2 + 12 * n + 4
    out = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", n))
    for i in range(n):
        out += struct.pack("<HHII", 0x112 if not i else 1000 + i, 3, len(blob) // 2, at)
    return _png(64, 64, _chunk(b"eXIf", bytes(out + b"\0\0\0\0") + blob))

@image("refused or read")
def x_png_iccp() -> bytes:
    return _png(64, 64, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(400 * MIB), 9)))

@image("refused or read")
def x_png_itxt() -> bytes:
    return _png(64, 64, _chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(MIB - 1), 9)) * 1000)

@image("refused or read")
def x_png_idat_bomb() -> bytes:
    """Pixels of 1 GiB behind those of 64 x 64"""
    rows = zlib.compress((b"\0" + bytes(192)) * 64 + bytes(1024 * MIB), 9)
    return _png(64, 64)[:33] + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")

@image("refused or read")
def x_mpo_of_pictures() -> bytes:
    tiny = _plain("RGB", (8, 8))
    b = io.BytesIO(); tiny.save(b, "MPO", save_all=True, append_images=[_plain("RGB", (8, 8))] * 3000)
    return b.getvalue()

@image("refused or read")
def x_webp_of_frames() -> bytes:
    b = io.BytesIO(); frames = [Image.new("RGB", (16, 16), (i % 256, i // 256 % 256, 0)) for i in range(20000)]
    frames[0].save(b, "WEBP", save_all=True, append_images=frames[1:], lossless=True, method=0)
    return b.getvalue()

@image("refused or read")
def x_webp_exif() -> bytes:
    n = 60_000; blob = bytes(100 * MIB)
    at = 8 + 2 + 12 * n + 4
    out = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", n))
    for i in range(n):
        out += struct.pack("<HHII", 0x112 if not i else 1000 + i, 7, len(blob), at)
    exif = bytes(out + b"\0\0\0\0") + blob
    return _encoded(_plain("RGB", (64, 64)), "WEBP", exif=b"Exif\0\0" + exif)

@image("refused or read")
def x_avif_wrong_size() -> bytes:
    data = _encoded(_plain("RGB", (6000, 6000)), "AVIF", speed=10)
    return data.replace(struct.pack(">II", 6000, 6000), struct.pack(">II", 64, 64))

@image("refused or read")
def x_avif_of_frames() -> bytes:
    b = io.BytesIO(); frames = [Image.new("RGB", (16, 16), (i % 256, 9, 9)) for i in range(500)]
    frames[0].save(b, "AVIF", save_all=True, append_images=frames[1:], speed=10)
    return b.getvalue()

@image("refused or read")
def x_bmp_deltas() -> bytes:
    width, height = 60_000_000, 1
    pixels = b"\0\2\0\xff" * 1000
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 1, 1, 256, 256)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(pixels), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + pixels

@image("refused or read")
def x_bmp_empty_runs() -> bytes:
    """runs of no pixel"""
    width, height = 4000, 4000
    pixels = b"\0\2\0\0" * (CAP // 4)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 1, 1, 256, 256)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(pixels), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + pixels

@image("refused or read")
def x_ppm_comment() -> bytes:
    return b"P6 #" + b"a" * CAP + b"\n8 8 255\n" + bytes(192)

@image("refused or read")
def x_ppm_plain() -> bytes:
    return b"P3\n6000 6000 255\n" + b"1 " * (108_000_000)

@image("refused or read")
def x_ppm_plain_comments() -> bytes:
    return b"P3\n64 64 255\n" + b"#a\n" * (CAP // 3) + b"1 " * (64 * 64 * 3)

@image("refused or read")
def x_jp2_of_boxes() -> bytes:
    data = _encoded(_plain("RGB", (64, 64)), "JPEG2000")
    at = data.index(b"jp2h") - 4
    return data[:at] + struct.pack(">I4s", 8, b"free") * (CAP // 8) + data[at:]

@image("refused or read")
def x_jp2_of_tiles() -> bytes:
    b = io.BytesIO(); _plain("RGB", (2048, 2048)).save(b, "JPEG2000", tile_size=(8, 8)); return b.getvalue()

@image("refused or read")
def x_jpeg_of_fill_bytes() -> bytes:
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG")
    return whole[:2] + b"\xff" * (31 * MIB) + whole[2:]

@image("refused or read")
def x_jpeg_of_escapes() -> bytes:
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG")
    return whole[:2] + b"\xff\0" * (31 * MIB // 2) + whole[2:]

@image("refused or read")
def x_jpeg_fill_in_scan() -> bytes:
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG")
    return whole[:-2] + b"\xff\0" * (CAP // 2) + whole[-2:]

@image("refused or read")
def x_jpeg_restarts() -> bytes:
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG", restart_marker_rows=1)
    return whole[:-2] + b"\xff\xd0" * (CAP // 2) + whole[-2:]

@image("refused or read")
def x_heif_of_images() -> bytes:
    import pillow_heif
    h = pillow_heif.HeifFile()
    for i in range(2000):
        h.add_from_pillow(Image.new("RGB", (16, 16), (i % 256, 9, 9)))
    b = io.BytesIO(); h.save(b, quality=10); return b.getvalue()

@image("refused or read")
def x_ico_of_pngs() -> bytes:
    png = _png(4000, 4000)
    n = 1000
    head = struct.pack("<HHH", 0, 1, n)
    return head + b"".join(struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(png), 6 + 16 * n) for _ in range(n)) + png

@image("refused or read")
def x_svg_as_png() -> bytes:
    return b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "' + b"a" * 1000 + b'">]><svg>' + b"&a;" * 1000000 + b"</svg>"

@image("refused or read")
def x_psd() -> bytes:
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 30000, 30000, 8, 3) + bytes(CAP)

@image("refused or read")
def x_qoi() -> bytes:
    return b"qoif" + struct.pack(">IIBB", 8000, 8000, 3, 0) + b"\xfd" * (8000 * 8000 // 62 + 1)
