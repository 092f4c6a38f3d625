"""The scorers of the 17B recipe on small random models of the same classes: no weights from the Hub."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from eval.judges.base import resolve
from tasks.curation.config import ScorerConfig
from tasks.curation.scorers import Sample, build_scorer, chosen_scorers, identity

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "photo", "of", "cat", "red", "cup", "dog", "blue"]
WIDTH, PX = 16, 32


def write_processor(folder, kind: str) -> None:
    import transformers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    settings = {"size": {"height": PX, "width": PX}, "do_center_crop": False}
    if kind == "Siglip2":  # NaFlex: any aspect ratio, as at most so many patches
        settings = {"patch_size": 8, "max_num_patches": 16}
    getattr(transformers, f"{kind}ImageProcessor")(**settings).save_pretrained(folder)


def write_encoder(folder, kind: str) -> str:
    """Writes a random model of the family's class, in the layout of its repository."""
    import transformers

    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": PX, "patch_size": 8}
    text = tower | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0}
    if kind.startswith("Siglip"):
        if kind == "Siglip2":
            vision = tower | {"num_patches": 16, "patch_size": 8}
        text |= {"projection_size": WIDTH}
        config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
        model = getattr(transformers, f"{kind}Model")(config)
    else:
        text |= {"bos_token_id": 2, "eos_token_id": 3}
        config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, projection_dim=WIDTH)
        model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(folder)
    write_processor(folder, kind if kind.startswith("Siglip") else "CLIP")
    return str(folder)


def write_head(folder, width=WIDTH) -> tuple[str, torch.nn.Sequential]:
    """Writes a head like LAION's: linear layers with dropout between them, so that their numbers have gaps."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(width, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)]
    head = torch.nn.Sequential(*layers).eval()
    torch.nn.init.constant_(head[3].bias, 5.0)
    folder.mkdir(exist_ok=True)
    save_file(
        {f"layers.{name}": value.contiguous() for name, value in head.state_dict().items()},
        folder / "model.safetensors",
    )
    return str(folder), head


def samples(count=3, captions=("a photo of a cat", "a red cup")) -> list[Sample]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(count)]
    return [Sample(image, np.asarray(image), np.asarray(image.convert("L")), captions) for image in images]


def built(**columns):
    names = {"watermark": "none", "aesthetic": "none"} | columns
    return {one.columns[0]: build_scorer(one) for one in chosen_scorers(ScorerConfig(**names))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CLIP", "MetaClip2", "Siglip", "Siglip2"])
def test_similarity_is_the_cosine_that_the_whole_model_gives(tmp_path, kind):
    import transformers

    place = write_encoder(tmp_path / "encoder", kind)
    choice = {"repo_id": place, "dtype": "float32"}
    actual = built(
        embedding={"name": "image-text-embedding"} | choice, similarity={"name": "embedding-similarity"} | choice
    )
    batch = samples()
    vectors = actual["embedding"](batch)["embedding"]
    assert vectors.dtype == np.float16 and vectors.shape == (3, WIDTH)
    assert np.linalg.norm(vectors.astype(float), axis=1) == pytest.approx(np.ones(3), abs=2e-3)
    seen = [Sample(s.image, s.pixels, s.gray, s.captions, v) for s, v in zip(batch, vectors, strict=True)]
    scores = actual["similarity"](seen)["similarity"]

    model = transformers.AutoModel.from_pretrained(place).eval()
    images = transformers.AutoImageProcessor.from_pretrained(place)(
        images=[s.image for s in batch], return_tensors="pt"
    )
    padding = {"padding": "max_length", "max_length": 16} if kind.startswith("Siglip") else {"padding": True}
    texts = transformers.AutoTokenizer.from_pretrained(place)(list(batch[0].captions), return_tensors="pt", **padding)
    with torch.inference_mode():
        out = model(
            input_ids=texts["input_ids"],
            **images,  # of NaFlex also masks and shapes
            **({} if kind.startswith("Siglip") else {"attention_mask": texts["attention_mask"]}),
        )
    expected = (out.image_embeds @ out.text_embeds.T).max(1).values.numpy()
    assert scores == pytest.approx(expected, abs=3e-3)
    assert np.isnan(
        actual["similarity"]([Sample(seen[0].image, seen[0].pixels, seen[0].gray, (), vectors[0])])["similarity"]
    ).all()


def test_an_aesthetic_head_is_rebuilt_from_its_safetensors(tmp_path):
    place, head = write_head(tmp_path / "head")
    encoder = write_encoder(tmp_path / "encoder", "CLIP")
    actual = built(
        embedding={"name": "image-text-embedding", "repo_id": encoder, "dtype": "float32"},
        aesthetic={"name": "aesthetic-head", "repo_id": place},
    )
    batch = samples()
    vectors = actual["embedding"](batch)["embedding"]
    seen = [Sample(s.image, s.pixels, s.gray, (), v) for s, v in zip(batch, vectors, strict=True)]
    with torch.inference_mode():
        expected = head(torch.from_numpy(vectors.astype(np.float32)))[:, 0].numpy()
    assert actual["aesthetic"](seen)["aesthetic"] == pytest.approx(expected, abs=1e-5)
    own = built(
        aesthetic={"name": "aesthetic-clip", "repo_id": place, "encoder": {"repo_id": encoder}, "dtype": "float32"}
    )
    assert own["aesthetic"](batch)["aesthetic"] == pytest.approx(expected, abs=1e-2), "with an encoder of its own"


def test_a_head_of_another_width_is_refused_with_both(tmp_path):
    place, _ = write_head(tmp_path / "head", width=24)
    encoder = write_encoder(tmp_path / "encoder", "CLIP")
    result = built(
        aesthetic={"name": "aesthetic-clip", "repo_id": place, "encoder": {"repo_id": encoder}, "dtype": "float32"}
    )
    with pytest.raises(ValueError, match="reads vectors of 24 components, and the embedding has 16"):
        result["aesthetic"](samples())


def write_classifier(folder) -> str:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=PX, patch_size=8,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": PX, "width": PX}).save_pretrained(folder)
    return str(folder)


def test_a_classifiers_score_is_the_probability_of_the_label(tmp_path):
    place = write_classifier(tmp_path / "classifier")
    choice = {"repo_id": place, "dtype": "float32"}
    result = built(
        nsfw={"name": "nsfw-classifier", "label": "nsfw"} | choice,
        watermark={"name": "watermark-classifier", "label": 0} | choice,
    )
    nsfw, other = result["nsfw"](samples())["nsfw"], result["watermark"](samples())["watermark"]
    assert nsfw + other == pytest.approx(np.ones(3), abs=1e-6) and 0 < nsfw.min() < 1
    wrong = built(nsfw={"name": "nsfw-classifier", "label": "porn"} | choice)
    with pytest.raises(ValueError, match=r"label='porn' is no label of .*\"1\": \"nsfw\""):
        wrong["nsfw"](samples())


def test_weights_of_a_directory_are_part_of_the_scorers_identity(tmp_path):
    place, head = write_head(tmp_path / "head")
    config = ScorerConfig(
        aesthetic={"name": "aesthetic-clip", "repo_id": place, "encoder": {"repo_id": place}}, watermark="none"
    )

    def name():
        from tasks.curation.scorers import _directory_digest

        _directory_digest.cache_clear()
        return json.dumps(identity(chosen_scorers(config)[0]), sort_keys=True)

    before = name()
    save_file({"0.weight": torch.ones(1, WIDTH)}, tmp_path / "head" / "model.safetensors")
    assert name() != before and str(tmp_path) not in before.replace(json.dumps(place), "")


def test_a_folder_of_a_repositorys_name_does_not_stand_in_for_its_pinned_commit(tmp_path, monkeypatch):
    repository = "owner/model"
    (tmp_path / "owner").mkdir()
    place, _ = write_head(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    choice = {"name": "nsfw-classifier", "label": 1}
    pinned = built(nsfw=choice | {"repo_id": repository, "revision": "0123456789" * 4})
    with pytest.raises(ValueError, match=r"there is also a folder ./owner/model"):
        pinned["nsfw"](samples())
    with pytest.raises(ValueError, match="revision is not set"):
        built(nsfw=choice | {"repo_id": repository})
    with pytest.raises(ValueError, match=r"there is also a folder ./owner/model"):
        resolve(repository, "0123456789" * 4)
    assert resolve(repository, place).identity.startswith("sha256:")


def test_what_cannot_be_loaded_is_named_with_its_place(tmp_path):
    (tmp_path / "empty").mkdir()
    result = built(nsfw={"name": "nsfw-classifier", "repo_id": str(tmp_path / "empty"), "label": 1})
    with pytest.raises(ValueError, match="empty cannot be loaded as a transformers AutoImageProcessor"):
        result["nsfw"](samples())
