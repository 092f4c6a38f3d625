"""A text judge for a CPU: PP-OCRv6 (English and Chinese) by rapidocr, with weights in its package.

OneIG's own judge of text is Qwen2.5-VL-7B, so that a score by this judge is `oneig[...]`. PP-OCR invents short text on
photographs and leaves out uncertain text; the two were never compared.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.judges.base import BaseJudge, Probe, check_sha256, libraries, only_image, package_folder
from eval.judging.protocols import Request

WEIGHTS = {
    "PP-OCRv6_det_small.onnx": "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    "PP-OCRv6_rec_small.onnx": "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
    "ch_ppocr_mobile_v2.0_cls_mobile.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
}
SETTINGS = {
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # more threads sum in another order
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    "Global.log_level": "critical",
}
MIN_SCORE = 0.85  # below it, photographs without text get lines


class PPOCR(BaseJudge):
    """See eval.judging.protocols.Judge. Lines are read from top to bottom, and joined by spaces.

    Raises:
        ValueError: rapidocr is not installed, or its weights differ.
    """

    name = "pp-ocr"
    model = "PP-OCRv6 small (rapidocr)"

    def __init__(self) -> None:
        folder = package_folder("rapidocr", "rapidocr") / "models"
        for name, digest in WEIGHTS.items():
            check_sha256(folder / name, digest)
        versions = libraries("rapidocr", "onnxruntime", "opencv-python-headless")
        from rapidocr import RapidOCR

        super().__init__(
            {
                "class": "rapidocr.RapidOCR",
                "weights": WEIGHTS,
                "dtype": "float32",
                "attention": None,
                "processor": "BGR, rapidocr's defaults",
                "decoding": f"lines of a score above {MIN_SCORE}, in rapidocr's order, joined by spaces",
                "settings": SETTINGS,
                "libraries": versions,
            }
        )
        self._ocr = RapidOCR(params=dict(SETTINGS))

    def answer_one(self, request: Request) -> str:
        return " ".join(text for _, text, _ in self.lines(only_image(request)))

    def lines(self, image: Image.Image) -> list[tuple[np.ndarray, str, float]]:
        """(corners [4, 2] in px, text, score above `MIN_SCORE`) of each line of an RGB image, from top to bottom."""
        read = self._ocr(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        lines = zip(read.boxes, read.txts, read.scores, strict=True) if read.txts else ()
        return [(box, text, score) for box, text, score in lines if score > MIN_SCORE]

    def probes(self) -> list[Probe]:
        return [Probe(_written("OPEN"), "OPEN"), Probe(Request([Image.new("RGB", (320, 128), "white")], ""), "")]


def _written(text: str) -> Request:
    image = Image.new("RGB", (320, 128), "white")
    ImageDraw.Draw(image).text((40, 32), text, font=ImageFont.load_default(56), fill="black")
    return Request([image], "")
