"""The sample order does not depend on ranks, accumulation or workers, and reading keeps few files open."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import torch

from model.data.latents import LatentDataset, LatentWriter

BATCH, STEPS = 8, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """40 images in two buckets, in shards of 4: 14 files."""
    path = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    with LatentWriter(path, text_dim=6, rows_per_file=4, dtype="float16") as writer:
        writer.add_text(torch.zeros(3, 6))
        for i in range(10):
            writer.add_text(torch.randn(2 + i, 6, generator=generator))
        for i in range(40):
            shape = (16, 8, 8) if i % 3 else (16, 4, 8)
            writer.add_image(f"{i:064x}", torch.randn(shape, generator=generator), "A1", [1 + i % 10, 1 + (i + 3) % 10])
    return path


def loader(directory, ranks=1, rank=0, accumulation=1, workers=0):
    from model.train.data import LatentDataLoader

    config = LatentDataLoader.Config(
        directory=str(directory), global_batch_size=BATCH, seed=3, tier_weights={"A1": 1.0}, num_workers=workers
    )
    local = BATCH // ranks // accumulation
    return LatentDataLoader(config, dp_world_size=ranks, dp_rank=rank, local_batch_size=local)


def read(made, steps=STEPS):
    iterator = iter(made)
    batches = list(itertools.islice(iterator, steps * made.accumulation))
    iterator.close()
    return batches


@pytest.fixture(scope="module")
def expected(directory):
    return read(loader(directory))


@pytest.mark.parametrize(
    "ranks, accumulation, workers", [(1, 1, 1), (1, 1, 5), (1, 4, 3), (2, 1, 0), (2, 2, 2), (8, 1, 3)]
)
def test_each_step_reads_the_same_samples_and_noise_for_any_ranks_and_workers(
    directory, expected, ranks, accumulation, workers
):
    parts = [read(loader(directory, ranks, rank, accumulation, workers)) for rank in range(ranks)]
    for step, whole in enumerate(expected):
        of_step = [batch for rank in parts for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert torch.equal(torch.cat([batch.latents for batch in of_step]), whole.latents)
        assert torch.equal(torch.cat([batch.noise for batch in of_step]), whole.noise)
        assert torch.equal(torch.cat([batch.text for batch in of_step]), whole.text)
        assert {batch.plan.step for batch in of_step} == {step}


@pytest.mark.parametrize("workers", [0, 3])
def test_a_loader_resumes_at_its_saved_step_although_workers_were_ahead(directory, expected, workers):
    first = loader(directory, accumulation=2, workers=workers)
    read(first, 3)
    assert int(first.state_dict()["step"]) == 3
    second = loader(directory, accumulation=2, workers=5 - workers)
    second.load_state_dict(first.state_dict())
    rest = read(second, STEPS - 3)
    for step, whole in enumerate(expected[3:]):
        assert torch.equal(torch.cat([batch.noise for batch in rest[2 * step : 2 * step + 2]]), whole.noise)


def test_workers_do_read_ahead_and_leave_no_thread_behind(directory, monkeypatch):
    import model.train.data as data

    seen, real = [], data.read_batch

    def read_batch(dataset, plan):
        seen.append((plan.step, threading.current_thread() is threading.main_thread()))
        return real(dataset, plan)

    monkeypatch.setattr(data, "read_batch", read_batch)
    iterator = iter(loader(directory, workers=2))
    next(iterator)
    deadline = time.monotonic() + 30
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(seen) == [(step, False) for step in range(4)]
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latents")]


def test_an_error_of_a_worker_reaches_training(directory, monkeypatch):
    import model.train.data as data

    monkeypatch.setattr(data, "read_batch", lambda dataset, plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader(directory, workers=2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_for_a_cuda_device_batches_are_pinned_by_who_reads_them_and_text_is_as_stored(
    directory, expected, workers, monkeypatch
):
    import model.train.data as data

    main, by_main = threading.main_thread(), []

    def pin_memory(tensor):
        by_main.append(threading.current_thread() is main)
        tensor.pinned = True  # this machine has no memory that a device could read
        return tensor

    monkeypatch.setattr(data, "DEVICE_TYPE", "cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    actual = read(loader(directory, workers=workers))
    for batch, plain in zip(actual, expected, strict=True):
        assert batch.text.dtype == torch.float16 and plain.text.dtype == torch.float32
        assert torch.equal(batch.text.float(), plain.text)
        for name in ("latents", "noise", "mask"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        assert all(getattr(batch, name).pinned for name in ("latents", "noise", "text", "mask"))
    assert set(by_main) == {not workers}


@pytest.mark.parametrize("pinned", [True, False])
def test_the_host_copies_from_pinned_memory_without_waiting(pinned):
    from model.train.data import to_device

    class Tensor:
        calls: list = []

        def is_pinned(self):
            return pinned

        def pin_memory(self):
            self.calls.append("pin")
            return self

        def to(self, device, non_blocking=False):
            self.calls.append((device.type, non_blocking))
            return self

    Tensor.calls = []
    to_device(Tensor(), torch.device("cuda"))
    assert Tensor.calls == ["pin"] * (not pinned) + [("cuda", True)]
    plain = torch.ones(2)
    assert to_device(plain, torch.device("cpu")) is plain


def open_files(directory) -> int:
    """Memory maps and descriptors of latents and texts below `directory` in this process."""

    def counts(path: str) -> bool:
        return str(directory) in path and ("latents-" in path or "texts-" in path)

    with open("/proc/self/maps") as maps:
        mapped = sum(map(counts, maps))
    return mapped + sum(counts(os.path.realpath(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd"))


def test_files_are_mapped_when_read_and_few_stay_so(directory, monkeypatch):
    monkeypatch.setattr(LatentDataset, "MAPPED_FILES", 3)
    before = open_files(directory)
    dataset = LatentDataset(directory)
    assert open_files(directory) == before
    whole = {row: dataset.latents([row]) for row in range(40)}
    assert open_files(directory) <= before + 2 * 3
    by_bucket = range(*dataset.bucket_begin[1:3])
    assert torch.equal(dataset.latents(by_bucket), torch.cat([whole[row] for row in by_bucket]))
    embeds, _ = dataset.text(range(11))
    assert embeds.shape[0] == 11 and open_files(directory) <= before + 2 * 3


def test_record_ids_are_in_the_order_of_the_given_rows(directory):
    dataset = LatentDataset(directory)
    ids = dataset.record_ids(range(40))
    assert ids[:14] == [f"{i:064x}" for i in range(0, 40, 3)]  # the first bucket's
    assert dataset.record_ids([39, 0, 7, 6, 7]) == [ids[row] for row in (39, 0, 7, 6, 7)]
