"""DPG-Bench's judge: mPLUG large, fine-tuned on VQA, by the class of PyPI modelscope 1.40.2 (Apache-2.0).

    image --504 x 504, bicubic, CLIP's mean and deviation--+
    question --lower case, 25 tokens-----------------------+--> beam search of 5, at most 10 tokens --> text, as it is

Only `yes`, to the letter, scores (eval.dpg). The package's modules of mPLUG are imported, and no other: its own start-up patches
transformers and prepares downloads, and its pipeline imports what reads videos. What transformers 5 no longer has, and mPLUG's
classes call, is put back on these classes alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from eval.judges import pins
from eval.judges.base import (
    CLIP_MEAN,
    CLIP_STD,
    BaseJudge,
    Probe,
    device,
    libraries,
    only_image,
    package_folder,
    unit_pixels,
)
from eval.judges.stand_ins import Normalize, importable, module, package_of
from eval.judging.protocols import Request

QUESTION_TOKENS = 25
RELEASED = {"image_res": 504, "vision_width": 1024, "clip_vision_layers": 24, "beam_size": 5}


class MPlug(BaseJudge):
    """See eval.judging.protocols.Judge ("vqa"): the answer is the model's text, for a question in lower case.

    Args:
        at: a directory of damo/mplug_visual-question-answering_coco_large_en (docs/evaluation.md).

    Raises:
        ValueError: the package is not installed, the directory lacks a file, or its files are of another model.
    """

    name = "mplug"
    model = "mPLUG of a directory (modelscope)"
    OFFICIAL = "damo/mplug_visual-question-answering_coco_large_en (modelscope)"
    FILES = ("config.yaml", "config_bert.json", "vocab.txt", "pytorch_model.bin")

    def __init__(self, at: str = ""):
        libraries("modelscope")
        identities = pins.digests(Path(at), self.FILES, self.name)
        with mplug_package() as package:
            model = build(package, Path(at))
        load_weights(model, Path(at) / "pytorch_model.bin")
        self._assemble(model.to(device()), {name: f"sha256:{digest}" for name, digest in identities.items()})
        if pins.is_pinned(self.name, identities) and all(
            getattr(model.config, key) == value for key, value in RELEASED.items()
        ):
            self.model = self.OFFICIAL

    def _assemble(self, model: Any, identities: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        self._normalize = Normalize(CLIP_MEAN, CLIP_STD)
        config = model.config
        super().__init__(
            {
                "class": "modelscope.models.multi_modal.mplug.MPlugForVisualQuestionAnswering",
                "weights": identities,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": "the package's own",
                "processor": f"RGB, {config.image_res} x {config.image_res} px, bicubic, CLIP's mean and deviation",
                "decoding": f"beam {config.beam_size}, {config.min_length} to {config.max_length} tokens; the question in "
                f"lower case, {QUESTION_TOKENS} tokens",
                "libraries": libraries("modelscope", "torch", "transformers", "pillow", "numpy"),
            }
        )

    @classmethod
    def of(cls, model: Any, identity: str) -> MPlug:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, identity)
        return judge

    def inputs(self, image: Image.Image, question: str) -> tuple[Any, Any]:
        """(pixels [1, 3, image_res, image_res] float32, tokens of the question: input_ids and attention_mask [1, 25])"""
        import torch

        pixels = self._normalize(torch.from_numpy(unit_pixels(image, self._model.config.image_res)))[None]
        tokens = self._model.tokenizer(
            question.lower(), padding="max_length", truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt"
        )
        return pixels.to(self._model.device), tokens.to(self._model.device)

    def answer_one(self, request: Request) -> str:
        import torch

        with torch.inference_mode():
            ids, _ = self._model(*self.inputs(only_image(request), request.text), train=False)
        return self._model.tokenizer.decode(ids[0][0], skip_special_tokens=True)

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (512, 512), (230, 10, 10))
        return [Probe(Request([red], f"Is the image {c}?"), a) for c, a in (("red", "yes"), ("blue", "no"))]


@contextmanager
def mplug_package() -> Iterator[ModuleType]:
    """The module modelscope.models.multi_modal.mplug.modeling_mplug.

    Its parents' __init__ do not run, and timm stands in: a video model in the same folder imports one function to fill weights
    with.

    Raises:
        ValueError: modelscope is not installed.
    """
    import torch
    import transformers

    root = package_folder("modelscope", "modelscope")
    parents = {
        name: package_of(name, str(root.joinpath(*name.split(".")[1:])))
        for name in ("modelscope", "modelscope.models", "modelscope.models.multi_modal")
    }
    timm = {name: module(name) for name in ("timm", "timm.models")}
    timm["timm.models.layers"] = module("timm.models.layers", trunc_normal_=torch.nn.init.trunc_normal_)
    level = transformers.logging.get_verbosity()
    try:
        with importable({**parents, **timm}, library="modelscope"):
            package = importlib.import_module("modelscope.models.multi_modal.mplug.modeling_mplug")
            for owner in (package.BertPreTrainedModel, package.MPlug):
                _restore(owner)
            yield package
    finally:
        transformers.logging.set_verbosity(level)  # which the package's import changes


def _restore(owner: Any) -> None:
    """Gives the class what transformers 4 had and 5 has not."""
    import torch

    def get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int) -> list[None]:
        assert head_mask is None, "no head is masked"
        return [None] * num_hidden_layers

    def invert_attention_mask(self: Any, mask: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] or [batch, queries, tokens], 1 for what is seen -> what is added to scores, by head."""
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
        return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min

    owner.all_tied_weights_keys = {}  # set by post_init, which these classes do not call; checkpoints have both tensors
    owner.get_head_mask = get_head_mask
    owner.invert_attention_mask = invert_attention_mask


def build(package: ModuleType, folder: Path) -> Any:
    """`MPlugForVisualQuestionAnswering` of the folder's configuration, without weights.

    The momentum copy of the network, which only training uses, is left out.

    Raises:
        ValueError: config.yaml is not a plain YAML mapping, or has values that the class refuses.
    """
    import yaml

    path = folder / "config.yaml"
    try:  # the package's own reader would make any Python object that the file names
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = package.MPlugConfig(**{**settings, "distill": False})
        config.model_dir = str(folder)
        return package.MPlugForVisualQuestionAnswering(config)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a configuration of mPLUG ({type(error).__name__}): {error}") from error


def load_weights(model: Any, path: Path) -> None:
    """Loads the release's pytorch_model.bin with torch's weights_only reader, which refuses pickles that name code.

    Raises:
        ValueError: it is not such a file, or a parameter is absent or has another shape.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "module"):
            state = state.get(key, state)
        assert isinstance(state, Mapping)
    except Exception as error:  # a pickle may fail in any way
        raise ValueError(f"{path} is not a file of weights ({type(error).__name__}): {error}") from error
    state = {name.replace("model.", ""): tensor for name, tensor in state.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[name]) for name in state.keys() & parameters.keys()}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in loaded]
    if missing:  # the official code would answer with random weights there
        raise ValueError(f"{path} lacks {len(missing)} of {len(parameters)} parameters, such as {missing[0]}")
    try:
        model.load_state_dict(state, strict=False)  # it also has the momentum copy
    except RuntimeError as error:
        raise ValueError(f"{path} has weights of another model: {error}") from error
