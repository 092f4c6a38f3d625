from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from tasks.encoding.encode import encode_stage
from transformers import Qwen3VLForConditionalGeneration

from model.data.latents import LatentDataset
from tasks.curation.shards import Record, ShardWriter
from tasks.encoding import chat, curated
from tasks.encoding.buckets import Bucket
from tasks.encoding.config import EncodingConfig, TinyVAEConfig
from tasks.encoding.small.vae import build_vae, to_tensor

STAGE = SimpleNamespace(image_size_px=64, aspect_ratios=("1:1", "4:3"))


@pytest.fixture(scope="module")
def latents(curated_dir, components, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    config = EncodingConfig(dtype="float32", rows_per_shard=40, batch_size=16, text_batch_size=32)
    return out, encode_stage(curated_dir, components[0], STAGE, config, out)


def test_the_train_split_is_encoded_and_nothing_else(curated_dir, latents):
    out, report = latents
    table = pd.read_parquet(curated_dir / "records.parquet")
    index = pq.read_table(out / "index.parquet").to_pandas()
    assert sorted(index["record_id"]) == sorted(table[table["split"] == "train"]["record_id"])
    assert report["images"] == len(index) == sum(report["buckets"].values())
    assert set(report["buckets"]) == {"64x64", "64x48"}


def test_latents_are_the_posteriors_mean_normalised_as_the_pipeline_undoes_it(curated_dir, components, latents):
    vae = AutoencoderKLQwenImage.from_pretrained(components[0] / "vae")
    dataset = LatentDataset(latents[0])
    table = curated.load_table(curated_dir)
    images = dict(curated.read_images(curated_dir, table, curated.buckets_of(table, [Bucket(64, 64), Bucket(64, 48)])))
    by_id = {record_id: images[i] for i, record_id in enumerate(table["record_id"])}
    for row in (0, 1, len(dataset) - 1):
        (record_id,) = dataset.record_ids([row])
        with torch.no_grad():
            want = vae.encode(to_tensor(by_id[record_id][None])[:, :, None]).latent_dist.mode()[0, :, 0]
        mean, std = (
            torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        torch.testing.assert_close(dataset.latents([row])[0] * std + mean, want, rtol=1e-3, atol=1e-4)


def test_latents_have_the_vaes_channels(curated_dir, components, latents, tmp_path):
    for part in ("text_encoder", "processor"):
        (tmp_path / part).symlink_to(components[0] / part)
    build_vae(TinyVAEConfig(z_dim=8), seed=0).save_pretrained(tmp_path / "vae")
    out = tmp_path / "latents"
    out.mkdir()
    encode_stage(curated_dir, tmp_path, STAGE, EncodingConfig(dtype="float32"), out, text_from=latents[0])
    dataset = LatentDataset(out)
    assert dataset.meta.latent_channels == 8 and dataset.latents([0]).shape[1] == 8


def test_every_caption_of_an_image_finds_its_own_embedding(curated_dir, components, latents):
    dataset = LatentDataset(latents[0])
    model = Qwen3VLForConditionalGeneration.from_pretrained(components[0] / "text_encoder").eval()
    processor = chat.load_processor(components[0] / "processor")
    table = curated.load_table(curated_dir).set_index("record_id")
    for row in (0, 17, len(dataset) - 1):
        (record_id,) = dataset.record_ids([row])
        captions = list(table.loc[record_id, "captions"])
        embeds, mask = dataset.text(dataset.captions(row))
        want, want_mask = chat.encode_text(model, processor, captions)
        assert embeds.shape == want.shape
        real = torch.ones(want.shape[:2], dtype=torch.bool) if want_mask is None else want_mask.bool()
        assert (mask is None and real.all()) or torch.equal(mask, real)
        torch.testing.assert_close(embeds[real], want[real], rtol=1e-3, atol=1e-4)


def test_row_0_is_the_empty_prompt_and_each_distinct_text_is_stored_once(components, curated_dir, latents):
    out, report = latents
    texts = pq.read_table(out / "texts.parquet")["text"].to_pylist()
    table = pd.read_parquet(curated_dir / "records.parquet")
    said = {text for captions in table[table["split"] == "train"]["captions"] for text in captions}
    assert texts[0] == "" and set(texts[1:]) == said and len(texts) == len(said) + 1 == report["texts"]
    model = Qwen3VLForConditionalGeneration.from_pretrained(components[0] / "text_encoder").eval()
    want, _ = chat.encode_text(model, chat.load_processor(components[0] / "processor"), [""])
    embeds, mask = LatentDataset(out).text([0])
    assert mask.tolist() == [[True] * 2 + [False] * 6]
    torch.testing.assert_close(embeds[0, :2], want[0, :2])


def test_a_later_stage_takes_the_texts_of_an_earlier_one(curated_dir, components, latents, tmp_path):
    config = EncodingConfig(dtype="float32", rows_per_shard=40)
    stage = SimpleNamespace(image_size_px=32, aspect_ratios=("1:1",))
    report = encode_stage(curated_dir, components[0], stage, config, tmp_path, text_from=latents[0])
    assert report["texts_reused"] and set(report["buckets"]) == {"32x32"}
    for name in sorted((latents[0] / "text").iterdir()):
        assert name.read_bytes() == (tmp_path / "text" / name.name).read_bytes()


def test_texts_of_another_encoder_or_precision_are_not_taken(curated_dir, components, latents, tmp_path):
    stage = SimpleNamespace(image_size_px=32, aspect_ratios=("1:1",))
    (tmp_path / "half").mkdir()
    half = EncodingConfig(dtype="float16")
    report = encode_stage(curated_dir, components[0], stage, half, tmp_path / "half", text_from=latents[0])
    assert not report["texts_reused"]

    other = tmp_path / "components"
    shutil.copytree(components[0], other)
    path = other / "processor" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 512}))
    (tmp_path / "other").mkdir()
    report = encode_stage(
        curated_dir, other, stage, EncodingConfig(dtype="float32"), tmp_path / "other", text_from=latents[0]
    )
    assert not report["texts_reused"]


def test_images_that_would_lose_too_much_are_left_out_and_counted(curated_dir, components, tmp_path):
    stage = SimpleNamespace(image_size_px=32, aspect_ratios=("1:1",))  # a 4:3 image loses a quarter
    report = encode_stage(curated_dir, components[0], stage, EncodingConfig(max_crop_fraction=0.2), tmp_path)
    table = pd.read_parquet(curated_dir / "records.parquet").query("split == 'train'")
    assert report["left_out_by_crop"] == (table["width"] != table["height"]).sum() > 0
    assert report["images"] + report["left_out_by_crop"] == len(table)


def test_a_stage_that_no_image_fits_is_refused(curated_dir, components, tmp_path):
    stage = SimpleNamespace(image_size_px=64, aspect_ratios=("9:16",))
    with pytest.raises(ValueError, match="give the stage more aspect_ratios"):
        encode_stage(curated_dir, components[0], stage, EncodingConfig(max_crop_fraction=0.1), tmp_path)


def test_a_processor_that_pads_on_the_left_is_refused(curated_dir, components, tmp_path):
    other = tmp_path / "components"
    shutil.copytree(components[0], other)
    path = other / "processor" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match="pads on the left"):
        encode_stage(curated_dir, other, STAGE, EncodingConfig(), tmp_path)


def test_the_same_input_gives_the_same_bytes(curated_dir, components, latents, tmp_path):
    config = EncodingConfig(dtype="float32", rows_per_shard=40, batch_size=16, text_batch_size=32)
    encode_stage(curated_dir, components[0], STAGE, config, tmp_path)
    names = [p.relative_to(latents[0]) for p in latents[0].rglob("*") if p.is_file()]
    assert len(names) >= 7  # all that the seal's digest covers
    for name in names:
        assert (tmp_path / name).read_bytes() == (latents[0] / name).read_bytes(), name


def test_images_are_read_upright_and_a_missing_record_is_named(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = (255, 0, 0)  # red on the left; turned by orientation 6 it is on top
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(data, "PNG", exif=exif)
    record = Record("turned", data.getvalue(), {"captions": ["a"], "source": "user", "meta": {}}, "png")
    with ShardWriter(tmp_path / "shards/00000.tar") as writer:
        writer.add(record)
    row = record.row(0) | {"width": 16, "height": 32, "tier": "A1", "split": "train"}
    pd.DataFrame([row]).to_parquet(tmp_path / "records.parquet")
    table = curated.load_table(tmp_path)
    ((_, image),) = curated.read_images(tmp_path, table, [Bucket(16, 32)])
    assert (image[:14] == (255, 0, 0)).all() and (image[18:] == 0).all()

    pd.DataFrame([row, row | {"key": "gone"}]).to_parquet(tmp_path / "records.parquet")
    table = curated.load_table(tmp_path)
    with pytest.raises(ValueError, match="1 records of records.parquet are in no shard, such as 'gone'"):
        list(curated.read_images(tmp_path, table, [Bucket(16, 32)] * 2))


def test_a_directory_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it has no records.parquet"):
        curated.load_table(tmp_path)
