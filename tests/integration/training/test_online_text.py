"""Texts encoded during training give the same losses as stored ones, at smoke size."""

from __future__ import annotations

import json

import pytest
from selected import scenes, select
from train_helpers import train_config, training_stage, transformer_config

from model.config import StageConfig
from tasks.encoding import flow
from tasks.encoding.config import EncodingConfig, TinyTextEncoderConfig, TinyVAEConfig
from tasks.encoding.open_latents import open_latents, text_settings
from tasks.encoding.text.prompts import OnlineText
from tasks.manifest import seal
from tasks.store import LOCATIONS

pytestmark = pytest.mark.slow


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """Untrained components, one stage's latents, and the texts in both forms."""
    from tasks.encoding.small.text_encoder import build_text_encoder
    from tasks.encoding.small.tokenizer import build_tokenizer, save_processor
    from tasks.encoding.small.vae import build_vae

    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    examples = scenes(40)
    curated = select(tmp_path / "source", [examples], tmp_path / "curated")
    components = tmp_path / "components"
    tokenizer = build_tokenizer([text for _, captions, _, _ in examples for text in captions], 128)
    save_processor(tokenizer, components / "processor")
    text = TinyTextEncoderConfig(hidden_size=48, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    build_text_encoder(text, tokenizer, 0).save_pretrained(components / "text_encoder")
    build_vae(TinyVAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2)), 0).save_pretrained(components / "vae")

    def made(kind: str, name: str, config: EncodingConfig):
        group, out = tmp_path / f"{name}-group", tmp_path / name
        group.mkdir()
        out.mkdir()
        if kind == "texts":
            flow.encode_texts_group(curated, components, config, 0, 1, group)
        else:
            stage = StageConfig(name="s", image_size_px=64, steps=10**6, batch_size=8, capacity_factors=2.0)
            tiers = {f"A{i}": 1.0 for i in range(1, 6)}
            flow.encode_latents_group(curated, components, stage, tiers, config, 0, 1, group)
        flow.gather(curated, [group], kind, out)
        seal(out, kind, logs=(LOCATIONS,))
        return out

    config = EncodingConfig(dtype="float16")
    online = config.model_copy(update={"text": "online"})
    return (
        components,
        made("latents", "latents", config),
        made("texts", "stored", config),
        made("texts", "online", online),
    )


def test_losses_with_online_texts_equal_those_with_stored_ones(artifacts, tmp_path):
    from model.train.run import train_stage

    components, latents, *texts = artifacts
    stage = training_stage(train_config(steps=8, log_every_steps=1), transformer_config(joint_attention_dim=48))
    losses = []
    for number, directory in enumerate(texts):
        index, settings = open_latents(latents, directory), text_settings(directory)
        out = tmp_path / f"out{number}"
        out.mkdir()
        text_fn = OnlineText(components, settings) if settings.form == "tokens" else None
        if text_fn is not None:
            with pytest.raises(ValueError, match="training needs a text encoder"):
                train_stage(index, stage, None, tmp_path / "refused", out)
        train_stage(index, stage, None, tmp_path / f"work{number}", out, text_fn=text_fn)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
