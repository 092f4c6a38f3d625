from __future__ import annotations

import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLQwenImage, NucleusMoEImagePipeline
from transformers import Qwen3VLForConditionalGeneration

from eval.benchmarks.shapes.vocabulary import COLORS, HELD_OUT_COLOR_SHAPE, NUMBERS, PLURALS, RELATIONS, SHAPES
from tasks.curation.sources.made import scenes
from tasks.encoding.components import make_components as make_components_of
from tasks.encoding.config import ComponentsConfig, HubComponent, TinyTextEncoderConfig, TinyVAEConfig
from tasks.encoding.small import text_encoder as tiny_text
from tasks.encoding.small import tokenizer as small_tokenizer
from tasks.encoding.small.vae import train_vae
from tasks.encoding.text import chat
from tasks.encoding.vae_codec import FrameCodec, to_tensor

REVISION = "0123456789abcdef0123456789abcdef01234567"
BENCHMARK = [
    word for text in (*SHAPES, *COLORS, *PLURALS.values(), *NUMBERS.values(), *RELATIONS) for word in text.split()
]


def make_components(curated_dir, config, out_dir):
    return make_components_of(curated_dir, config, out_dir)


def build_tokenizer(captions, vocab_size=128):
    return small_tokenizer.build_tokenizer(captions, vocab_size, [*BENCHMARK, "photo", "and"])


# ---------------------------------------------------------------- the VAE


@pytest.mark.parametrize(
    "config",
    [
        {"base_dim": 4, "dim_mult": [1, 2, 2, 4], "num_res_blocks": 1},
        {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 2},
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_one_frame_in_two_dimensions_equals_the_video_model(config, size):
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **config).eval()
    for parameter in vae.parameters():  # gains and biases must be used correctly too
        parameter.data += 0.1 * torch.randn_like(parameter)
    codec = FrameCodec(vae)
    images = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images[:, :, None]).latent_dist
        mean, logvar = codec.encode(images)
        torch.testing.assert_close(mean, posterior.mean[:, :, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logvar, posterior.logvar[:, :, 0], rtol=1e-4, atol=1e-5)
        want = vae.decode(posterior.mean).sample[:, :, 0]
        torch.testing.assert_close(codec.decode(mean).clamp(-1, 1), want, rtol=1e-4, atol=1e-4)


def test_every_parameter_that_a_frame_uses_is_trained_and_no_other():
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    codec = FrameCodec(vae)
    mean, logvar = codec.encode(torch.rand(1, 3, 16, 16))
    (codec.decode(mean).sum() + logvar.sum()).backward()
    trained = [*codec.matrices(), *codec.others()]
    assert len({id(p) for p in trained}) == len(trained)
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in vae.parameters() if not any(p is q for q in trained))


@pytest.mark.slow
def test_the_trained_vae_is_a_plain_one_that_diffusers_loads(components, curated_dir):
    out, report = components
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")
    assert 2 ** len(vae.config.temperal_downsample) == 8  # the pipeline's scale
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 16
    codec = FrameCodec(vae)
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            vae.encode(image[:, :, None]).latent_dist.mean[:, :, 0], codec.encode(image)[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_training_lowers_the_error_and_the_report_scores_held_out_images_at_every_size(components):
    _, report = components
    assert set(report["psnr_db_by_size_px"]) == {"64", "48", "32"}
    assert report["psnr_db"] == report["psnr_db_by_size_px"]["64"]["all"]
    assert set(report["psnr_db_by_size_px"]["64"]) == {"all", "user"}
    assert report["psnr_db"] > 11, "25 steps must beat a plain grey image"


@pytest.mark.slow
def test_latents_are_normalised_by_the_statistics_in_the_config():
    pixels = {(64, 64): np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)}
    vae = train_vae(pixels, TinyVAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2), steps=3, batch_size=2, latent_std=0.25))
    with torch.no_grad():
        mean, logvar = FrameCodec(vae).encode(to_tensor(pixels[(64, 64)]))
    variance = mean.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))
    np.testing.assert_allclose(vae.config.latents_mean, mean.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(vae.config.latents_std, 4 * variance.sqrt(), rtol=1e-3)


@pytest.mark.slow
def test_the_same_seed_trains_the_same_vae_and_another_seed_another():
    pixels = {(64, 64): np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)}
    config = TinyVAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2), steps=4, batch_size=2)
    a, b, c = (train_vae(pixels, config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.slow
def test_a_vae_under_the_wanted_psnr_is_refused(curated_dir, small_config, tmp_path):
    config = small_config.model_copy(
        update={"min_psnr_db": 60.0, "vae": small_config.vae.model_copy(update={"steps": 1})}
    )
    with pytest.raises(ValueError, match=r"under components\.min_psnr_db=60\.0: raise components\.vae\.steps"):
        make_components(curated_dir, config, tmp_path)


# ---------------------------------------------------------------- tokenizer and chat format


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["a small red circle, at the top-left", "a handwritten digit 7"], 128)


def test_a_prompt_costs_two_tokens_more_than_its_words(tokenizer):
    (prompt,) = chat.format_prompts(tokenizer, ["a photo of a red circle"])
    assert tokenizer.tokenize(prompt) == ["<|system|>", "a", "photo", "of", "a", "red", "circle", "<|im_end|>"]
    lengths = [
        len(ids) for ids in tokenizer(chat.format_prompts(tokenizer, [" ".join(["circle"] * 14), ""]))["input_ids"]
    ]
    assert lengths == [16, 2]


def test_the_tokenizer_knows_the_given_words_whatever_the_corpus(tokenizer):
    words = [*SHAPES, *COLORS, *PLURALS.values(), *NUMBERS.values(), "a photo of and", *RELATIONS]
    ids = tokenizer(" ".join(words).upper())["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("zeppelin")["input_ids"] == [tokenizer.unk_token_id]


def test_words_are_split_from_punctuation(tokenizer):
    assert tokenizer.tokenize("Red circle, top-left") == ["red", "circle", ",", "top", "-", "left"]


def test_without_given_words_the_vocabulary_is_the_corpus():
    tokenizer = small_tokenizer.build_tokenizer(["a small red bird", "a small bird"], 128)
    words = sorted(set(tokenizer.get_vocab()) - set(small_tokenizer.SPECIAL_TOKENS))
    assert words == ["a", "bird", "red", "small"]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("一只红色的鸟", list("一只红色的鸟")),
        ("a 红 bird", ["a", "红", "bird"]),
        ("赤い鳥が飛ぶ", list("赤い鳥が飛ぶ")),
        ("นกสีแดง", ["น", "ก", "สี", "แ", "ด", "ง"]),
        ("빨간 새", ["빨간", "새"]),
        ("Red circle, top-left", ["red", "circle", ",", "top", "-", "left"]),
    ],
)
def test_words_without_spaces_between_them_are_more_than_one_token(caption, tokens, tmp_path):
    tokenizer = small_tokenizer.build_tokenizer([caption], 128)
    small_tokenizer.save_processor(tokenizer, tmp_path)
    for loaded in (tokenizer, chat.load_processor(tmp_path)):
        assert loaded.tokenize(caption) == tokens
        assert loaded.unk_token_id not in loaded(caption)["input_ids"]


def test_a_vocabulary_too_small_for_the_given_words_is_refused():
    with pytest.raises(ValueError, match="vocab_size=20 must be at least"):
        build_tokenizer(["a"], 20)


def test_prompts_formatted_at_once_equal_those_formatted_one_by_one(tokenizer):
    texts = ["a red circle", "", "  two  spaces ", "a {{ brace }}", "line\nbreak"]
    one_by_one = [chat.format_prompts(tokenizer, [text])[0] for text in texts]
    assert chat.format_prompts(tokenizer, texts) == one_by_one
    trimming = tokenizer.chat_template.replace("{{ part.text }}", "{{ part.text | trim }}")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, chat_template=trimming)
    assert chat.format_prompts(tokenizer, ["  two  spaces "]) == ["<|system|>two  spaces<|im_end|>"]


@pytest.mark.slow
def test_the_processor_loads_by_the_class_that_its_config_names(components, tokenizer):
    folder = components[0] / "processor"
    name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    for loaded in (getattr(transformers, name).from_pretrained(folder), chat.load_processor(folder)):
        assert loaded.padding_side == "right" and loaded.pad_token_id == 0
        assert chat.format_prompts(loaded, ["a"]) == ["<|system|>a<|im_end|>"]


# ---------------------------------------------------------------- the text encoder


def _load_text(out):
    model = Qwen3VLForConditionalGeneration.from_pretrained(out / "text_encoder").eval()
    return model, chat.load_processor(out / "processor")


@pytest.mark.parametrize(
    "texts",
    [
        ["a photo of a red circle"],  # 8 tokens: no padding, no mask
        ["", "a photo of two squares", "a red zeppelin left of a blue square on a gray background"],
        ["", ""],
    ],
)
@pytest.mark.slow
def test_embeddings_equal_what_the_pipeline_feeds(components, texts):
    model, processor = _load_text(components[0])
    vae = AutoencoderKLQwenImage.from_pretrained(components[0] / "vae")
    pipeline = NucleusMoEImagePipeline(
        transformer=None, scheduler=None, vae=vae, text_encoder=model, processor=processor
    )
    with torch.no_grad():
        want, want_mask = pipeline.encode_prompt(texts, device="cpu", max_sequence_length=1024)
    embeds, mask = chat.encode_text(model, processor, texts)
    assert embeds.shape[1] % 8 == 0
    assert torch.equal(embeds, want)
    assert (mask is None) == (want_mask is None)
    assert mask is None or torch.equal(mask, want_mask)


@pytest.mark.slow
def test_embeddings_of_a_text_do_not_depend_on_its_batch(components):
    model, processor = _load_text(components[0])
    text = "a photo of a red circle"
    alone, _ = chat.encode_text(model, processor, [text])
    beside, mask = chat.encode_text(model, processor, [text, text + " and a blue square above a green cross"])
    assert mask[0].tolist() == [1] * 8 + [0] * (beside.shape[1] - 8)
    torch.testing.assert_close(beside[0, :8], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_encoding_leaves_the_whole_model_in_place(components):
    model, processor = _load_text(components[0])
    chat.encode_text(model, processor, ["a red circle"])
    assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers
    assert not isinstance(model.model.language_model.norm, torch.nn.Identity)


@pytest.mark.parametrize("index", [-1, -12])
@pytest.mark.slow
def test_a_hidden_state_that_is_not_there_is_refused(components, index):
    model, processor = _load_text(components[0])
    with pytest.raises(ValueError, match=f"hidden_state_index={index}"):
        chat.encode_text(model, processor, ["a"], hidden_state_index=index)


def _share(states: torch.Tensor, labels: list[str]) -> float:
    """Share of the states' variance [n, D] that a label explains."""
    states = torch.nn.functional.normalize(states.double(), dim=-1)
    names = np.array(labels)
    between = sum(
        float((names == name).mean()) * (states[names == name].mean(0) - states.mean(0)).square().sum()
        for name in set(labels)
    )
    return float(between / states.var(0, unbiased=False).sum())


def _probe(states: torch.Tensor, labels: list[str]) -> float:
    """Accuracy of a linear probe, fitted on the first two thirds and scored on the rest."""
    names = sorted(set(labels))
    x = torch.nn.functional.normalize(states.double(), dim=-1)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    y = torch.tensor([names.index(label) for label in labels])
    cut = len(x) * 2 // 3
    gram = x[:cut].T @ x[:cut] + 1e-4 * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x[:cut].T @ torch.nn.functional.one_hot(y[:cut]).double())
    return float(((x[cut:] @ weights).argmax(1) == y[cut:]).double().mean())


@pytest.mark.slow
def test_states_bind_each_colour_to_its_own_object():
    rng = np.random.default_rng(0)
    captions = [scenes.captions(scenes.sample_scene(rng, kind="two"), rng)[:3] for _ in range(600)]
    tokenizer = build_tokenizer([text for texts in captions for text in texts], 128)
    config = TinyTextEncoderConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, steps=160, batch_size=24
    )
    model, losses = tiny_text.train_text_encoder(captions, tokenizer, config)
    assert losses["early"] < 1.7 and losses["last"] < 1.7, "an untrained model has log(vocabulary), about 3.9"

    colors, shapes = list(COLORS), list(SHAPES)
    drawn = [[rng.choice(colors), rng.choice(shapes), rng.choice(colors), rng.choice(shapes)] for _ in range(600)]
    assert any((color, shape) in HELD_OUT_COLOR_SHAPE for color, shape, _, _ in drawn), "unseen pairs must bind, too"
    prompts = ["a photo of a {} {} left of a {} {}".format(*row) for row in drawn]
    embeds, _ = chat.encode_text(model, tokenizer, prompts)
    first, second = embeds[:, 6], embeds[:, 11]  # <|system|> a photo of a {} [noun] left of a {} [noun]
    own = [row[2] for row in drawn]
    other = [row[0] for row in drawn]
    assert _probe(first, other) >= 0.95
    assert _probe(second, own) >= 0.95
    assert _share(second, own) > 0.25, "a faint trace is not found by a diffusion model in minutes"
    assert _share(second, own) > 3 * _share(second, other)
    assert 0.1 < float(embeds.norm(dim=-1).mean()) < 1e4, "float16 must hold the states"


@pytest.mark.slow
def test_the_same_seed_trains_the_same_text_encoder():
    captions = [["a red circle", "one red circle"], ["a blue square"]]
    tokenizer = build_tokenizer([text for texts in captions for text in texts], 128)
    config = TinyTextEncoderConfig(
        hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, steps=5, batch_size=4
    )
    models = [tiny_text.train_text_encoder(captions, tokenizer, config, seed)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads=3 must divide num_attention_heads=4"):
        TinyTextEncoderConfig(num_key_value_heads=3)
    with pytest.raises(ValueError, match="dim_mult=.* must have 4 entries"):
        TinyVAEConfig(dim_mult=(1, 2, 4))


# ---------------------------------------------------------------- from the Hub


@pytest.fixture
def hub_dirs(components, tmp_path):
    """Directories laid out as the two repositories are: the VAE in a subfolder, model and processor side by side."""
    vae, text = tmp_path / "Qwen-Image", tmp_path / "Qwen3-VL"
    shutil.copytree(components[0] / "vae", vae / "vae")
    shutil.copytree(components[0] / "text_encoder", text)
    shutil.copytree(components[0] / "processor", text, dirs_exist_ok=True)
    (text / "README.md").write_text("not needed")
    return vae, text


def _hub_config(vae, text, **changes) -> ComponentsConfig:
    return ComponentsConfig(
        kind="hub",
        hub_vae=HubComponent(repo_id=str(vae), revision=REVISION, subfolder="vae"),
        hub_text_encoder=HubComponent(repo_id=str(text), revision=REVISION),
        **{"min_psnr_db": 5.0, **changes},
    )


@pytest.mark.slow
def test_hub_components_are_laid_out_checked_and_load(hub_dirs, curated_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    report = make_components(curated_dir, _hub_config(*hub_dirs), out)
    assert report["psnr_db"] > 5
    model, processor = _load_text(out)
    assert chat.encode_text(model, processor, ["a red circle"])[0].shape == (1, 8, 48)
    assert AutoencoderKLQwenImage.from_pretrained(out / "vae").config.z_dim == 16
    assert not list(out.rglob("README.md")) and not list((out / "processor").glob("*.safetensors"))


@pytest.mark.slow
def test_a_download_is_pinned_to_the_revision_and_the_files_needed(hub_dirs, curated_dir, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        return str(hub_dirs[0] if "Image" in repo_id else hub_dirs[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    out = tmp_path / "out"
    out.mkdir()
    make_components(curated_dir, _hub_config("Qwen/Qwen-Image", "Qwen/Qwen3-VL-8B-Instruct"), out)
    assert {(repo, revision) for repo, revision, _ in asked} == {
        ("Qwen/Qwen-Image", REVISION),
        ("Qwen/Qwen3-VL-8B-Instruct", REVISION),
    }
    assert all(name.startswith("vae/") for name in asked[0][2]) and "vae/config.json" in asked[0][2]
    names = [name for _, _, names in asked for name in names]
    assert all(name.endswith((".json", ".txt", ".jinja", ".safetensors")) and "*" not in name for name in names)
    assert not any(fnmatch.fnmatch(f"{part}tokenizer.py", name) for part in ("", "vae/") for name in names)


@pytest.mark.slow
def test_a_folder_named_like_a_repository_does_not_take_its_place(hub_dirs, curated_dir, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append(repo_id)
        return str(hub_dirs[0] if "Image" in repo_id else hub_dirs[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shutil.copytree(hub_dirs[0], tmp_path / "Qwen" / "Qwen-Image")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    make_components(curated_dir, _hub_config("Qwen/Qwen-Image", "Qwen/Qwen3-VL-8B-Instruct"), tmp_path / "out")
    assert "Qwen/Qwen-Image" in asked


@pytest.mark.slow
def test_a_local_directory_brings_no_code_and_claims_no_commit(hub_dirs, curated_dir, tmp_path):
    (hub_dirs[1] / "tokenizer.py").write_text("print('code')")
    out = tmp_path / "out"
    out.mkdir()
    report = make_components(curated_dir, _hub_config(*hub_dirs), out)
    assert not list(out.rglob("*.py")) and report["vae"] == {
        "repo_id": "local directory", "revision": None, "subfolder": "vae",
    }  # fmt: skip


def test_a_hub_that_cannot_be_reached_is_one_message(curated_dir, tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=f"Qwen/Qwen-Image at {REVISION} is not available: no route"):
        make_components(curated_dir, _hub_config("Qwen/Qwen-Image", "Qwen/Qwen3-VL-8B-Instruct"), tmp_path)


def test_another_class_of_model_is_refused(hub_dirs, curated_dir, tmp_path):
    path = hub_dirs[0] / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "AutoencoderKL"}))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="'AutoencoderKL', 'AutoencoderKLQwenImage' is needed"):
        make_components(curated_dir, _hub_config(*hub_dirs), out)
