"""GenEval's detector: Mask2Former Swin-S, with mmdet's preprocessing and instance post-processing.

GenEval uses mmdet's weights; the Hub's weights of a similar name are from another training, so scores by this judge are
named `geneval[mask2former-clip]`. transformers' own `post_process_instance_segmentation` makes masks at 384 px, keeps
one class per query and gives no boxes; mmdet's keeps the best 100 pairs of query and class, with masks of the image's
size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eval.benchmarks.geneval import CLASSES
from eval.judges.base import BaseJudge, Probe, device, libraries, only_image, resolve
from eval.judges.clip_color import CLIPColors
from eval.judging.protocols import Request

if TYPE_CHECKING:
    import torch

REPOSITORY = "facebook/mask2former-swin-small-coco-instance"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0..255
SHORT_PX, LONG_PX, DIVISOR = 800, 1333, 32
TOP = 100
REMEMBERED = 64  # number of images whose masks are kept for colours


@dataclass(frozen=True)
class Detection:
    """box: [x0, y0, x1, y1) in pixels, all 0 for an empty mask. mask: bool [height, width]."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


def resized(width: int, height: int, short: int = SHORT_PX, long: int = LONG_PX) -> tuple[int, int]:
    """(height, width) in pixels, the ratio kept, within `short` for the short and `long` for the long side."""
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(image: Image.Image, short: int = SHORT_PX, long: int = LONG_PX) -> tuple[torch.Tensor, tuple[int, int]]:
    """mmdet's test pipeline: ([1, 3, H, W] padded right and below to multiples of 32, (height, width) without padding).

    Bilinear without antialiasing, rounded to whole values, as OpenCV does it.
    """
    import torch
    import torch.nn.functional as F

    size = resized(*image.size, short, long)
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
    pixels = pixels.round().clamp(0, 255)
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return F.pad(pixels, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
    top: int = TOP,
) -> list[Detection]:
    """mmdet's `instance_postprocess`, best first.

    Args:
        class_logits: [queries, classes + 1]; the last class is "no object".
        mask_logits: [queries, h, w].
        padded, size, original: (height, width) of the model's input, of its part that is the image, and of the image.
    """
    import torch.nn.functional as F

    classes = class_logits.shape[-1] - 1
    scores, pairs = class_logits.softmax(dim=-1)[:, :-1].flatten().topk(min(top, class_logits.shape[0] * classes))
    labels, queries = pairs % classes, pairs // classes
    used, place = queries.unique(return_inverse=True)  # masks are large, and several pairs share a query
    masks = F.interpolate(mask_logits[used][None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : size[0], : size[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]
    binary = masks > 0
    area = binary.flatten(1).sum(dim=1)
    inside = (masks.sigmoid() * binary).flatten(1).sum(dim=1) / (area + 1e-6)
    scores = scores * inside[place]
    order = scores.argsort(descending=True, stable=True)
    arrays = binary.cpu().numpy()
    boxes = [_extent(mask) for mask in arrays]
    rows = zip(labels[order].tolist(), scores[order].tolist(), place[order].tolist(), strict=True)
    return [Detection(label, score, boxes[i], arrays[i]) for label, score, i in rows]


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around the mask; its right and lower ends are beyond the last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


class Mask2Former:
    """Objects of an image, by class; keeps the masks of the last images.

    Args:
        model: a `Mask2FormerForUniversalSegmentation` of COCO's 80 classes.
    """

    def __init__(self, model: Any, short: int = SHORT_PX, long: int = LONG_PX):
        if model.config.num_labels != len(CLASSES):
            raise ValueError(f"the detector has {model.config.num_labels} classes, and GenEval needs {len(CLASSES)}")
        self._model, self._short, self._long = model.eval(), short, long
        self._cache: OrderedDict[str, dict[str, list[Detection]]] = OrderedDict()

    def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
        """{class: detections, best first}"""
        import torch

        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if digest not in self._cache:
            pixels, size = preprocess(image, self._short, self._long)
            with torch.inference_mode():
                out = self._model(pixel_values=pixels.to(self._model.device, self._model.dtype))
                detections = postprocess(
                    out.class_queries_logits[0].float(),
                    out.masks_queries_logits[0].float(),
                    tuple(pixels.shape[-2:]),
                    size,
                    (image.height, image.width),
                )
            objects: dict[str, list[Detection]] = {}
            for detection in detections:
                objects.setdefault(CLASSES[detection.label], []).append(detection)
            self._cache[digest] = objects
            if len(self._cache) > REMEMBERED:
                self._cache.popitem(last=False)
        return self._cache[digest]


class Mask2FormerCLIP(BaseJudge):
    """See eval.judging.protocols.Judge. A request with boxes asks for the colours of detected objects, others for
    objects.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "mask2former-clip"
    model = f"{REPOSITORY} with mmdet's post-processing, ViT-L-14 openai (transformers)"

    def __init__(self, at: str | None = None):
        import torch
        from transformers import Mask2FormerForUniversalSegmentation

        weights = resolve(REPOSITORY, at)
        model = Mask2FormerForUniversalSegmentation.from_pretrained(
            weights.place, revision=weights.revision, dtype=torch.float32, use_safetensors=True
        )
        colors, color_spec = CLIPColors.load()
        self._assemble(Mask2Former(model.to(device())), colors, weights.identity, color_spec)

    def _assemble(self, detector: Mask2Former, colors: CLIPColors, identity: str, color_spec: dict[str, Any]) -> None:
        self._detector, self._colors = detector, colors
        super().__init__(
            {
                "class": "transformers.Mask2FormerForUniversalSegmentation",
                "weights": identity,
                "dtype": "float32",
                "attention": "eager",
                "processor": f"mmdet's: {SHORT_PX}/{LONG_PX} px, bilinear without antialiasing, padded to {DIVISOR}",
                "decoding": f"mmdet's instance_postprocess: best {TOP} pairs of query and class, masks at the image's size",
                "color": {**color_spec, "masks": "the detector's, #999 outside"},
                "libraries": libraries("torch", "transformers", "pillow", "numpy"),
            }
        )

    @classmethod
    def of(cls, detector: Mask2Former, colors: CLIPColors, identity: str) -> Mask2FormerCLIP:
        """The judge of models that are loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(detector, colors, identity, {})
        return judge

    def answer_one(self, request: Request) -> Any:
        image = only_image(request)
        objects = self._detector.detect(image)
        if "boxes" not in request.options:
            return {
                name: [{"box": list(d.box), "score": d.score} for d in detections]
                for name, detections in sorted(objects.items())
            }
        name, boxes = request.options["class"], request.options["boxes"]
        detections = objects.get(name, [])
        masks = [
            detections[i].mask
            for i in request.options["indices"]
            if i < len(detections) and list(detections[i].box) in boxes
        ]
        if len(masks) != len(boxes):
            raise ValueError(
                f"the boxes of {name!r} are not this judge's detections: {self.name} must answer both as detector and color"
            )
        return self._colors.colors(image, name, boxes, masks)

    def probes(self) -> list[Probe]:
        return [Probe(Request([Image.new("RGB", (96, 64), (120, 120, 120))], ""))]

    def comparable(self, answer: Any) -> Any:
        """The best scores; detections far below any threshold need not agree."""
        best = sorted(((d["score"], name) for name, detections in answer.items() for d in detections), reverse=True)[:3]
        return [round(score, 3) for score, _ in best]
