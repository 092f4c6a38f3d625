r"""Scorers whose weights come from the Hub at a pinned commit, or from a directory.

    image --ImageTextEmbedding--> embedding (float16, stored) --EmbeddingSimilarity--> cosine to the captions
                                                              \--AestheticHead-------> score
    image --AestheticCLIP--> its own encoder, then the head, for a head of another encoder
    image --Classifier-----> probability of a label

The encoders are `get_image_features` and `get_text_features` of transformers' AutoModel for CLIP, MetaCLIP 2, SigLIP
and SigLIP 2. No repository's code runs, and only safetensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.judges.base import device, refuse_shadow
from tasks.curation.config import HubModel
from tasks.curation.scorers.base import Sample

if TYPE_CHECKING:
    from tasks.curation.scorers import Chosen


def _from_pretrained(auto_class: str, model: HubModel, dtype: str | None = None) -> Any:
    """
    Raises:
        ValueError: the repository or directory cannot be read, or has no safetensors.
    """
    import transformers

    if not model.is_directory:
        refuse_shadow(model.repo_id)
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": False}
    if dtype is not None:
        import torch

        options |= {"dtype": getattr(torch, dtype), "use_safetensors": True}
    try:
        return getattr(transformers, auto_class).from_pretrained(model.repo_id, **options)
    except (OSError, ValueError, KeyError) as error:
        place = model.repo_id if model.revision is None else f"{model.repo_id} at {model.revision}"
        raise ValueError(f"{place} cannot be loaded as a transformers {auto_class}: {error}") from error


def _hub_file(model: HubModel, name: str) -> Path:
    if model.is_directory:
        return Path(model.repo_id) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model.repo_id, name, revision=model.revision))


def _model(chosen: Chosen) -> HubModel:
    return HubModel(repo_id=chosen.choice.repo_id, revision=chosen.choice.revision)


class Encoder:
    """The image and text encoders of one model; vectors of length 1, float32."""

    SIGLIP_TOKENS = 64  # longer captions are cut, as by its own processor

    def __init__(self, model: HubModel, dtype: str) -> None:
        self._source, self._dtype = model, dtype

    @cached_property
    def _model(self):
        return _from_pretrained("AutoModel", self._source, self._dtype).to(device()).eval()

    @cached_property
    def _images(self):
        return _from_pretrained("AutoImageProcessor", self._source)

    @cached_property
    def _tokenizer(self):
        return _from_pretrained("AutoTokenizer", self._source)

    def images(self, samples: Sequence[Sample]) -> np.ndarray:
        """[N, D]"""
        import torch

        batch = self._images(images=[sample.image for sample in samples], return_tensors="pt")
        with torch.inference_mode():
            batch = {
                k: v.to(device(), self._model.dtype) if v.is_floating_point() else v.to(device())
                for k, v in batch.items()
            }
            return _unit(self._model.get_image_features(**batch))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D]"""
        import torch

        limit = self._model.config.get_text_config().max_position_embeddings
        siglip = self._model.config.model_type.startswith(
            "siglip"
        )  # trained on captions padded to its length, unmasked
        batch = self._tokenizer(
            list(texts),
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=min(limit, self.SIGLIP_TOKENS) if siglip else limit,
            return_tensors="pt",
        )
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        accepted = {name: batch[name].to(device()) for name in names}
        with torch.inference_mode():
            return _unit(self._model.get_text_features(**accepted))


def _unit(features: Any) -> np.ndarray:
    import torch

    pooled = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()


class ImageTextEmbedding:
    """The embedding of CLIP, MetaCLIP 2, SigLIP or SigLIP 2, of length 1."""

    def __init__(self, chosen: Chosen) -> None:
        self._encoder = Encoder(_model(chosen), chosen.dtype)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"embedding": self._encoder.images(samples).astype(np.float16)}


class EmbeddingSimilarity:
    """The cosine of the stored embedding and the best caption. All captions of a batch are encoded at once."""

    def __init__(self, chosen: Chosen) -> None:
        self._encoder = Encoder(_model(chosen), chosen.dtype)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        scores = np.full(len(samples), np.nan, np.float32)
        texts = list(dict.fromkeys(text for sample in samples for text in sample.captions))
        if texts:
            place = {text: i for i, text in enumerate(texts)}
            vectors = np.concatenate([self._encoder.texts(texts[i : i + 256]) for i in range(0, len(texts), 256)])
            for i, sample in enumerate(samples):
                if sample.captions:
                    captions = vectors[[place[text] for text in sample.captions]]
                    scores[i] = np.clip((captions @ sample.embedding.astype(np.float32)).max(), -1, 1)
        return {"similarity": scores}


class AestheticHead:
    """A head on the stored embedding: linear layers from a safetensors file.

    The layers are rebuilt from the file's tensors, in their order: `*.weight` [out, in] with `*.bias` [out]. Dropout
    between the layers of published heads has no effect here. LAION's heads have no activations.
    """

    FILE = "model.safetensors"

    def __init__(self, chosen: Chosen) -> None:
        self._source = _model(chosen)

    @cached_property
    def _layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        from safetensors.numpy import load_file

        tensors = {
            name: value.astype(np.float32) for name, value in load_file(_hub_file(self._source, self.FILE)).items()
        }
        names = sorted((name.removesuffix(".weight") for name in tensors if name.endswith(".weight")), key=_by_number)
        layers = [(tensors[f"{name}.weight"], tensors.get(f"{name}.bias", np.zeros(1, np.float32))) for name in names]
        fits = all(a[0].shape[0] == b[0].shape[1] for a, b in zip(layers, layers[1:], strict=False))
        if not layers or not fits or layers[-1][0].shape[0] != 1 or any(weight.ndim != 2 for weight, _ in layers):
            shapes = {name: list(value.shape) for name, value in tensors.items()}
            raise ValueError(
                f"{self._source.repo_id}/{self.FILE} is not a chain of linear layers that ends in 1: {shapes}"
            )
        return layers

    def score(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [N] for vectors [N, D] of length 1.

        Raises:
            ValueError: the head was trained on vectors of another size.
        """
        width = self._layers[0][0].shape[1]
        if vectors.shape[1] != width:
            raise ValueError(
                f"the head {self._source.repo_id} reads vectors of {width} components, and the embedding has "
                f"{vectors.shape[1]}: name the encoder that it was trained on"
            )
        for weight, bias in self._layers:
            vectors = vectors @ weight.T + bias
        return np.clip(vectors[:, 0], 0, 10)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"aesthetic": self.score(np.stack([sample.embedding for sample in samples]).astype(np.float32))}


def _by_number(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


class AestheticCLIP:
    """A head with the encoder that it was trained on."""

    def __init__(self, chosen: Chosen) -> None:
        self._head, self._encoder = AestheticHead(chosen), Encoder(chosen.choice.encoder, chosen.dtype)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"aesthetic": self._head.score(self._encoder.images(samples))}


class Classifier:
    """An image classifier of transformers: the probability of one of its labels."""

    def __init__(self, chosen: Chosen) -> None:
        (self._column,) = chosen.columns
        self._source, self._dtype, self._label = _model(chosen), chosen.dtype, chosen.choice.label

    @cached_property
    def _model(self):
        return _from_pretrained("AutoModelForImageClassification", self._source, self._dtype).to(device()).eval()

    @cached_property
    def _images(self):
        return _from_pretrained("AutoImageProcessor", self._source)

    def _index(self) -> int:
        """
        Raises:
            ValueError: the model has no such label.
        """
        labels = {int(index): str(name) for index, name in self._model.config.id2label.items()}
        matches = [index for index, name in labels.items() if self._label in (index, name)]
        if not matches:
            raise ValueError(
                f"curation.scorers.{self._column}.label={self._label!r} is no label of {self._source.repo_id}; its labels "
                f"are {json.dumps(labels, ensure_ascii=False)}"
            )
        return matches[0]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        import torch

        batch = self._images(images=[sample.image for sample in samples], return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(batch["pixel_values"].to(device(), self._model.dtype)).logits
        return {self._column: torch.softmax(logits.float(), dim=-1)[:, self._index()].cpu().numpy()}
