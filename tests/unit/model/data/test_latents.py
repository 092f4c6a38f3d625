import json

import numpy as np
import pytest
import torch

from model.data.hashing import hash_words, permuted_index
from model.data.latents import LatentDataset, LatentWriter
from model.data.order import SampleOrder, read_batch

META = dict(text_dim=6, rows_per_file=7)
TIERS = ("A1", "A2", "A3")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """60 images of three bucket sizes over many small shards, and what was written."""
    directory = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(3, 6, generator=generator)]
    texts += [torch.randn(1 + i % 20, 6, generator=generator) for i in range(30)]
    images, captions = [], []
    with LatentWriter(directory, **META) as writer:
        for text in texts:
            writer.add_text(text)
        for i in range(60):
            height, width = ((8, 8), (8, 8), (4, 8), (8, 12))[i % 4]
            images.append(torch.randn(16, height, width, generator=generator))
            captions.append([1 + i % 30, 1 + (i * 7) % 30][: 1 + i % 2])
            writer.add_image(f"{i:064x}", images[i], TIERS[i % 3], captions[i])
    return directory, texts, images, captions


def test_any_row_reads_back_what_was_written(written):
    directory, texts, images, captions = written
    dataset = LatentDataset(directory)
    assert len(dataset) == 60
    assert {name: sum(counts) for name, counts in dataset.meta.buckets.items()} == {
        "64x32": 15,
        "64x64": 30,
        "96x64": 15,
    }
    numbers = [int(record_id, 16) for record_id in dataset.record_ids(range(60))]
    assert sorted(numbers) == list(range(60))
    for row in np.random.default_rng(0).permutation(60):
        assert torch.equal(dataset.latents([row])[0], images[numbers[row]])
        assert dataset.captions(row).tolist() == captions[numbers[row]]
        assert dataset.record_ids([row]) == [f"{numbers[row]:064x}"]
        assert dataset.tier_names[dataset.tier[row]] == TIERS[numbers[row] % 3]
    for row, text in enumerate(texts):
        embeds, mask = dataset.text([row])
        assert embeds.shape[1] % 8 == 0
        assert torch.equal(embeds[0, : len(text)], text) and not embeds[0, len(text) :].any()
        assert mask is None if len(text) % 8 == 0 else mask.sum() == len(text)


def test_images_of_a_bucket_keep_the_order_of_the_corpus_and_by_tier_has_each_once(written):
    dataset = LatentDataset(written[0])
    ids = dataset.record_ids(range(60))
    for code in range(3):
        begin, end = dataset.bucket_begin[code : code + 2]
        assert ids[begin:end] == sorted(ids[begin:end])
        inside = dataset.by_tier[begin:end]
        assert sorted(inside.tolist()) == list(range(begin, end))
        assert dataset.tier[inside].tolist() == sorted(dataset.tier[begin:end].tolist())


def test_a_gather_over_files_keeps_the_given_order(written):
    directory, texts, images, _ = written
    dataset = LatentDataset(directory)
    rows = list(range(*dataset.bucket_begin[1:3]))[::-1]
    rows = rows + rows[:3]  # repeats too
    numbers = [int(record_id, 16) for record_id in dataset.record_ids(rows)]
    assert torch.equal(dataset.latents(rows), torch.stack([images[number] for number in numbers]))
    text_rows = [19, 2, 0, 30, 2]
    embeds, mask = dataset.text(text_rows)
    assert mask.sum(1).tolist() == [len(texts[row]) for row in text_rows]
    for got, row in zip(embeds, text_rows):
        assert torch.equal(got[: len(texts[row])], texts[row])


def test_a_half_precision_store_reads_as_float32(tmp_path):
    latent = torch.randn(16, 4, 4)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        out = tmp_path / name
        out.mkdir()
        with LatentWriter(out, dtype=name, **META) as writer:
            writer.add_text(torch.ones(8, 6))
            writer.add_image("a", latent, "A1", [0])
        read = LatentDataset(out).latents([0])
        assert read.dtype == torch.float32
        assert torch.equal(read[0], latent.to(dtype).float())


def test_order_is_a_pure_function_of_seed_and_step(written):
    dataset = LatentDataset(written[0])
    forwards = SampleOrder(dataset, 16, 3, None, 0.2)
    order = SampleOrder(dataset, 16, 3, None, 0.2)
    backwards = {step: order.batch(step) for step in reversed(range(40))}
    differs = 0
    for step in range(40):
        plan = forwards.batch(step)
        assert plan.bucket == backwards[step].bucket
        for field in ("rows", "captions", "text_rows", "noise_seeds"):
            assert np.array_equal(getattr(plan, field), getattr(backwards[step], field))
        assert plan.timestep_seed == backwards[step].timestep_seed
        differs += not np.array_equal(plan.rows, SampleOrder(dataset, 16, 4, None, 0.2).batch(step).rows)
    assert differs > 35


def test_rank_slices_partition_the_global_batch(written):
    dataset = LatentDataset(written[0])
    plan = SampleOrder(dataset, 16, 0, None, 0.3).batch(5)
    whole = read_batch(dataset, plan)
    for ranks, accumulation in ((1, 1), (4, 1), (2, 4)):
        parts = [
            read_batch(dataset, plan.share(rank, ranks).share(micro, accumulation))
            for rank in range(ranks)
            for micro in range(accumulation)
        ]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert torch.equal(torch.cat([part.text for part in parts]), whole.text)
        assert [part.plan.start for part in parts] == list(range(0, 16, 16 // len(parts)))
    with pytest.raises(ValueError, match="16 cannot be cut into 3"):
        plan.share(0, 3)


def test_all_samples_of_a_step_share_one_bucket_and_buckets_get_their_share(written):
    dataset = LatentDataset(written[0])
    order = SampleOrder(dataset, 8, 0)
    steps = {}
    for step in range(SampleOrder.CYCLE):
        plan = order.batch(step)
        assert {dataset.bucket_names[code] for code in dataset.bucket_of(plan.rows)} == {plan.bucket}
        steps[plan.bucket] = steps.get(plan.bucket, 0) + 1
    assert steps == {"64x32": 256, "64x64": 512, "96x64": 256}


def test_the_first_step_of_each_bucket_is_the_one_that_a_run_meets_first(written):
    """A compiler warms up on these, in this order."""
    order = SampleOrder(LatentDataset(written[0]), 8, 0)
    met = {}
    for step in range(order.CYCLE):
        met.setdefault(order.batch(step).bucket, step)
    assert order.first_steps() == list(met.values()) and len(met) > 1


@pytest.mark.slow
def test_every_image_is_seen_once_per_epoch(written):
    dataset = LatentDataset(written[0])
    order = SampleOrder(dataset, 5, 0)
    seen = {name: [] for name in dataset.bucket_names}
    for step in range(1200):
        plan = order.batch(step)
        seen[plan.bucket] += plan.rows.tolist()
    for code, name in enumerate(dataset.bucket_names):
        rows = np.arange(*dataset.bucket_begin[code : code + 2])
        epochs = [seen[name][i : i + len(rows)] for i in range(0, len(seen[name]) - len(rows) + 1, len(rows))]
        assert len(epochs) > 50 and all(sorted(epoch) == rows.tolist() for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_tiers_are_read_in_proportion_to_their_weights(written):
    dataset = LatentDataset(written[0])
    order = SampleOrder(dataset, 32, 0, {"A1": 3.0, "A2": 1.0})
    counts = np.zeros(len(dataset))
    for step in range(1024):
        np.add.at(counts, order.batch(step).rows, 1)
    of_tier = {name: counts[dataset.tier == code].sum() for code, name in enumerate(dataset.tier_names)}
    assert of_tier["A3"] == 0
    assert of_tier["A1"] / of_tier["A2"] == pytest.approx(3.0, rel=0.02)
    for code in range(3):
        inside = dataset.bucket_of(np.arange(60)) == code
        rows = inside & (np.asarray(dataset.tier) == dataset.tier_names.index("A1"))
        assert counts[rows].min() > 0.9 * counts[rows].max()
    with pytest.raises(ValueError, match="A1, A2, A3"):
        SampleOrder(dataset, 8, 0, {"A5": 1.0})


def test_dropped_captions_use_the_empty_prompt_at_the_configured_rate(written):
    dataset = LatentDataset(written[0])
    order = SampleOrder(dataset, 64, 0, None, 0.1)
    dropped = total = 0
    chosen = np.zeros(2)
    for step in range(300):
        plan = order.batch(step)
        drop = plan.captions < 0
        assert np.array_equal(drop, plan.text_rows == 0)
        for row, caption, text_row in zip(plan.rows[~drop], plan.captions[~drop], plan.text_rows[~drop]):
            assert dataset.captions(row)[caption] == text_row
        two = (~drop) & (dataset.caption_begin[plan.rows + 1] - dataset.caption_begin[plan.rows] == 2)
        chosen += np.bincount(plan.captions[two], minlength=2)
        dropped, total = dropped + drop.sum(), total + len(drop)
    assert dropped / total == pytest.approx(0.1, abs=0.01)
    assert chosen[0] / chosen.sum() == pytest.approx(0.5, abs=0.03)


def test_noise_is_standard_normal_and_differs_by_step_and_sample(written):
    dataset = LatentDataset(written[0])
    order = SampleOrder(dataset, 32, 0)
    steps = [step for step in range(20) if order.batch(step).bucket == "64x64"][:2]
    first, second = (read_batch(dataset, order.batch(step)).noise for step in steps)
    assert first.mean().abs() < 0.02 and (first.std() - 1).abs() < 0.02
    flat = torch.cat([first, second]).flatten(1)
    correlation = flat @ flat.T / flat.shape[1]
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 0.2


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1024, 5000])
def test_permuted_index_is_a_bijection(size):
    index = np.arange(size)
    results = [permuted_index(index, size, hash_words(key)) for key in range(3)]
    for result in results:
        assert sorted(result.tolist()) == index.tolist()
    if size > 90:
        assert not np.array_equal(results[0], results[1])
        assert abs(np.corrcoef(index, results[0])[0, 1]) < 0.2


def test_an_unfinished_directory_is_refused(tmp_path):
    with pytest.raises(RuntimeError), LatentWriter(tmp_path, **META) as writer:
        writer.add_text(torch.ones(8, 6))
        writer.add_image("a", torch.zeros(16, 4, 4), "A1", [0])
        raise RuntimeError
    with pytest.raises(ValueError, match="no index.json"):
        LatentDataset(tmp_path)


def test_the_writer_names_what_does_not_fit(tmp_path):
    writer = LatentWriter(tmp_path, **META)
    writer.add_text(torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"shape \[25, 5\] does not fit \[1 or more, 6\]"):
        writer.add_text(torch.zeros(25, 5))
    with pytest.raises(ValueError, match="text rows"):
        writer.add_image("a", torch.zeros(16, 4, 4), "A1", [1])
    with pytest.raises(ValueError, match="has 4 channels"):
        writer.add_image("a", torch.zeros(4, 4, 4), "A1", [0])
    with pytest.raises(ValueError, match="multiple of the patch size"):
        writer.add_image("a", torch.zeros(16, 4, 3), "A1", [0])


def test_the_index_counts_texts_and_images(written):
    meta = json.loads((written[0] / "index.json").read_text())
    assert meta["text_rows"] == 31 and meta["text_dim"] == 6 and sum(map(sum, meta["buckets"].values())) == 60
