"""The judges by name, each imported when it is loaded.

`NAME@AT` sets the weights: a commit of the judge's Hub repository, or a directory.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.judging.protocols import Judge

# name -> (module:function, roles, description)
JUDGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "shapes-detector": (
        "eval.judges.shapes_judge:ShapesDetector",
        ("detector",),
        "classical image processing for the shapes benchmark",
    ),
    "ssd-mobilenet-v2": (
        "eval.judges.ssd_mobilenet:SSDMobileNet",
        ("detector", "color"),
        "TensorFlow's SSD MobileNet-V2 (COCO) by OpenCV, colours by XKCD's survey; runs on a CPU",
    ),
    "xkcd-color": (
        "eval.judges.xkcd_color:XKCDColor",
        ("color",),
        "the nearest of the colours that people named in XKCD's survey; runs on a CPU",
    ),
    "pp-ocr": ("eval.judges.pp_ocr:PPOCR", ("ocr",), "PP-OCRv6, English and Chinese, by rapidocr; runs on a CPU"),
    "mask2former-clip": (
        "eval.judges.mask2former:Mask2FormerCLIP",
        ("detector", "color"),
        "Mask2Former Swin-S of the Hub with mmdet's post-processing, colours by CLIP ViT-L/14",
    ),
    "clip-color": ("eval.judges.clip_color:CLIPColor", ("color",), "CLIP ViT-L/14 on boxes, without masks"),
    "qwen2.5-vl-7b": ("eval.judges.qwen_vl:Qwen25VL", ("vqa", "ocr"), "OneIG's judge of alignment and text"),
    "qwen2.5-vl-7b-yes-no": (
        "eval.judges.qwen_vl:Qwen25VLYesNo",
        ("vqa",),
        "Qwen2.5-VL-7B for DPG-Bench's questions, instead of mPLUG",
    ),
    "blip-vqa": ("eval.judges.blip_vqa:BlipVQA", ("vqa",), "BLIP, fine-tuned on VQA v2, for DPG-Bench's questions"),
    "mplug": ("eval.judges.mplug:MPlug", ("vqa",), "DPG-Bench's judge; needs @DIR of its release"),
    "llm2clip": (
        "eval.judges.llm2clip:LLM2CLIP",
        ("reasoning",),
        "OneIG's judge of reasoning; needs @COMMIT, runs its code",
    ),
    "oneig-style": (
        "eval.judges.style:OneIGStyle",
        ("style",),
        "CSD and OneIG's style encoder; needs @DIR of converted weights",
    ),
    "dreamsim": (
        "eval.judges.dreamsim:DreamSim",
        ("diversity",),
        "OneIG's judge of diversity; needs @DIR of its release",
    ),
    "efficientnet-lite0": (
        "eval.judges.features:EfficientNetLite0",
        ("features", "diversity"),
        "ImageNet features of EfficientNet-Lite0, for captions; runs on a CPU",
    ),
    "dinov2": (
        "eval.judges.features:DINOv2",
        ("features", "diversity"),
        "features of DINOv2-base of the Hub, for captions",
    ),
    "clip-similarity": (
        "eval.judges.clip_similarity:CLIPSimilarity",
        ("similarity",),
        "cosine of an image to its caption by CLIP ViT-L/14",
    ),
    "qwen3-vl-8b": ("eval.judges.qwen_vl:Qwen3VL", ("soft_tifa",), "GenEval 2's judge: probabilities of first tokens"),
}


def _split(name: str) -> tuple[str, str | None]:
    base, separator, at = name.partition("@")
    return base, at if separator else None


def check(name: str) -> None:
    """
    Raises:
        ValueError: there is no such judge; suggests the nearest name.
    """
    base, at = _split(name)
    if base not in JUDGES and ":" not in base:
        close = difflib.get_close_matches(base.lower(), JUDGES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no judge {base!r}; {hint}It must be one of {', '.join(JUDGES)}, or module:function")
    if at == "":
        raise ValueError(f"judge {name!r} names no weights after '@': give a commit of its repository, or a directory")


def load(name: str) -> Judge:
    """Makes the judge and loads its weights.

    Args:
        name: of `JUDGES`, or a "module:function" of your own; either may be followed by "@" and the place of weights.

    Raises:
        ValueError: see `check`; or its packages or weights are missing.
    """
    check(name)
    base, at = _split(name)
    module, _, attribute = (JUDGES[base][0] if base in JUDGES else base).partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {base!r} cannot be loaded: {error}") from error
    try:
        return make() if at is None else make(at)
    except (ImportError, TypeError) as error:  # TypeError: a judge with fixed weights takes no AT
        raise ValueError(f"judge {name!r} cannot be loaded: {error}") from error
