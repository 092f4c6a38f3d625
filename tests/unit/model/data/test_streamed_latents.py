"""Latents read from their store: the same bits as from a copy, only the rows of a batch, and each row checked."""

from __future__ import annotations

import itertools
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from object_store import s3_bucket
from s3fs import S3FileSystem

from model import storage
from model.data.latents import LatentDataset, LatentWriter
from model.data.streamed import StreamedLatents, common_folder

IMAGES, SHARD = 24, 5
LATENT_BYTES = {8: 16 * 8 * 8 * 4, 4: 16 * 4 * 8 * 4}  # by height


def write(path, dtype="float32"):
    """Images in two buckets and texts of 1 to 11 tokens, in shards of 5."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    with LatentWriter(path, text_dim=6, rows_per_file=SHARD, dtype=dtype) as writer:
        for length in range(1, 12):
            writer.add_text(torch.randn(6, length, generator=generator).T)  # as strided as a batch's may be
        for i in range(IMAGES):
            latent = torch.randn(16, 8 if i % 3 else 4, 8, generator=generator)
            writer.add_image(f"{i:064x}", latent, f"A{1 + i % 2}", [1 + i % 10, 1 + (i + 3) % 10])
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def directory(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents") / request.param, request.param)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket of a server of S3's protocol on this machine, with the float32 latents in it, and the local ones."""
    with s3_bucket("latents") as fs:
        local = write(tmp_path_factory.mktemp("latents") / "float32")
        fs.put(str(local), "latents/stage", recursive=True)
        yield local, "s3://latents/stage"


@pytest.fixture
def damaged(directory, tmp_path, request):
    """A copy for damage."""
    return shutil.copytree(directory, tmp_path / "damaged")


def batches(directory, stream_from=None, workers=0, steps=6):
    from model.train.data import LatentDataLoader

    config = LatentDataLoader.Config(
        directory=str(directory), stream_from=stream_from, global_batch_size=8, seed=3, num_workers=workers,
        tier_weights={"A1": 1.0, "A2": 2.0}, caption_dropout=0.3,
    )  # fmt: skip
    iterator = iter(LatentDataLoader(config, dp_world_size=1, dp_rank=0, local_batch_size=4))
    result = list(itertools.islice(iterator, 2 * steps))
    iterator.close()
    return result


def assert_same(streamed, copied):
    for ours, theirs in zip(streamed, copied, strict=True):
        assert np.array_equal(ours.plan.rows, theirs.plan.rows) and ours.plan.bucket == theirs.plan.bucket
        for name in ("latents", "text", "noise"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert (ours.mask is None) == (theirs.mask is None) and (
            ours.mask is None or torch.equal(ours.mask, theirs.mask)
        )


def test_batches_are_the_same_bits_as_those_of_a_copy(directory, tmp_path):
    indices = tmp_path / "indices"
    shutil.copytree(directory, indices, ignore=shutil.ignore_patterns("latents-*", "texts-*"))
    assert_same(batches(indices, str(directory)), batches(directory))


@pytest.mark.slow
def test_a_batch_reads_only_its_rows_from_an_object_store_and_no_whole_file(bucket, monkeypatch):
    local, uri = bucket
    asked, real = [], S3FileSystem._call_s3

    async def call(self, method, *args, **options):
        asked.append((method, options.get("Key"), options.get("Range")))
        return await real(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", call)
    streamed = batches(local, uri, workers=2)
    assert_same(streamed, batches(local))
    assert {method for method, _, _ in asked} == {"get_object"} and all("safetensors" in key for _, key, _ in asked)
    sizes = [
        int(end) - int(begin) + 1 for begin, end in (limits.removeprefix("bytes=").split("-") for _, _, limits in asked)
    ]
    read = sum(size for (_, key, limits), size in zip(asked, sizes) if "bucket" in key and "bytes=0-" not in limits)
    wanted = sum(LATENT_BYTES[batch.latents.shape[2]] * len(batch.plan) for batch in streamed)
    ahead = 2 * 2 * 4 * LATENT_BYTES[8]  # micro-batches that the workers read ahead
    assert wanted <= read <= wanted + ahead
    # Of a text its real tokens, once where several samples of a batch have it.
    assert (
        max(size for (_, key, limits), size in zip(asked, sizes) if "texts-" in key and "bytes=0-1023" not in limits)
        <= 11 * 6 * 4
    )


@pytest.mark.slow
def test_a_forked_process_reads_though_its_parent_has_read(bucket):
    local, uri = bucket
    dataset = StreamedLatents(local, uri)
    expected = dataset.latents([1, 2])
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = torch.equal(dataset.latents([1, 2]), expected)
        finally:
            os._exit(not same)
    assert os.waitpid(child, 0)[1] == 0


def flip(path, of: bytes, place: int = -1):
    """Changes one bit of `of` within a file."""
    content = bytearray(path.read_bytes())
    begin = content.index(of)
    content[begin + place % len(of)] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_refused_when_its_row_is_read_with_the_record_id(damaged):
    dataset = StreamedLatents(damaged, damaged)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dataset.meta.dtype]
    good = dataset.latents([13, 14])
    (record_id,) = dataset.record_ids([14])
    flip(
        damaged / "latents/bucket-64x64/latents-00001.safetensors",
        bytes(good[1].to(dtype).view(torch.uint8).flatten().tolist()),
    )
    assert torch.equal(dataset.latents([13]), good[:1])
    named = rf"record {record_id} \(row 14\): bytes \d+ to \d+ of .*bucket-64x64/latents-00001.safetensors are corrupt"
    with pytest.raises(ValueError, match=named):
        dataset.latents([13, 14])


def test_a_flipped_bit_of_a_text_is_refused(damaged):
    dataset = StreamedLatents(damaged, damaged)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dataset.meta.dtype]
    embeds, _ = dataset.text([7])
    real = embeds[0, :8].to(dtype).view(torch.uint8).flatten().tolist()
    flip(damaged / "texts/text/texts-00000.safetensors", bytes(real))
    dataset.text([6, 8])
    with pytest.raises(ValueError, match=r"text row 7: bytes \d+ to \d+ of .*text/texts-00000.safetensors are corrupt"):
        dataset.text([6, 7, 8])


def test_a_shortened_file_is_refused(damaged):
    path = damaged / "latents/bucket-64x64/latents-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    last = int(LatentDataset(damaged).bucket_begin[1]) + SHARD - 1
    with pytest.raises(ValueError, match=f"row {last}"):
        StreamedLatents(damaged, damaged).latents([last])


@pytest.fixture
def reads(monkeypatch):
    """Ranges (file, begin) that are read from a local folder; the first `reads.failing` of them fail."""
    real = LocalFileSystem.cat_file

    class Reads(list):
        failing = 0

    reads = Reads()

    def cat_file(self, path, start=None, end=None, **options):
        reads.append((os.path.basename(path), start))
        if len(reads) <= reads.failing:
            raise OSError("503 Slow Down")
        return real(self, path, start, end, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    return reads


def test_what_fails_for_a_moment_is_read_again_and_nothing_else_is(directory, reads):
    dataset = StreamedLatents(directory, directory)
    expected = LatentDataset(directory).latents([1, 2])
    dataset.latents([1])  # the header
    reads.clear()
    reads.failing = 1
    assert torch.equal(dataset.latents([1, 2]), expected)
    assert len(reads) == 3 and reads[2] == reads[0] != reads[1]


def test_what_fails_for_long_is_one_error_with_the_file_and_the_range(directory, reads):
    reads.failing = 10**6
    expected = r"bucket-64x32/latents-00000.safetensors: bytes 0 to \d+ could not be read in 5 attempt.*503 Slow Down"
    with pytest.raises(ConnectionError, match=expected):
        StreamedLatents(directory, directory).latents([1])
    assert len(reads) == 5


def test_a_file_that_is_gone_is_not_waited_for(damaged, reads):
    (damaged / "latents/bucket-64x32/latents-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="latents-00000.safetensors: bytes 0 to"):
        StreamedLatents(damaged, damaged).latents([1])
    assert len(reads) == 1


def test_a_header_is_read_once(directory, reads, monkeypatch):
    dataset = StreamedLatents(directory, directory)
    dataset.latents([0, 1, 2])
    dataset.latents([3, 1])
    dataset.text([1, 2, 1])
    dataset.text([3, 0])
    assert len([name for name, begin in reads if name.startswith("text") and begin]) == 3  # and each text of a batch
    assert [name for name, begin in reads if begin == 0] == ["latents-00000.safetensors", "texts-00000.safetensors"]
    monkeypatch.setattr("model.data.streamed.HEADERS_KEPT", 2)
    dataset.latents([IMAGES - 1])
    assert len(dataset._data_begin) <= 2
    assert torch.equal(dataset.latents([8, IMAGES - 1]), LatentDataset(directory).latents([8, IMAGES - 1]))


def test_parts_in_several_stores_are_refused_and_others_are_read_from_their_common_folder():
    assert common_folder(["s3://b/x/latents/1", "s3://b/x/texts/2"]) == "s3://b/x"
    assert common_folder(["/a/latents/1", "/b/texts/2"]) == "/"
    with pytest.raises(ValueError, match="in several stores, such as s3://a/x and s3://b/y"):
        common_folder(["s3://a/x", "s3://b/y"])


def test_the_checksums_are_of_the_bytes_in_the_files(directory):
    dataset = LatentDataset(directory)
    assert dataset.text_lengths(np.arange(11)).tolist() == list(range(1, 12))
    file = (directory / "latents/bucket-64x32/latents-00000.safetensors").read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    size = (len(file) - end) // SHARD
    result = [zlib.crc32(file[end + i * size : end + (i + 1) * size]) for i in range(SHARD)]
    assert dataset.crc32[:SHARD].tolist() == result
