"""OneIG-Bench's judge of diversity: DreamSim's ensemble of three fine-tuned ViT-B/16, by PyPI dreamsim 0.2.1 (MIT).

    tile --224 x 224, bicubic--> three towers, LoRA --> one embedding [1792], mean 0, norm 1
    all pairs of a prompt's tiles --> 1 - cosine, from embeddings that are each computed once

The model is the package's own `PerceptualModel`. Its function `dreamsim()` is not called: it downloads, and takes DINO's class from
torch.hub, which is code of a branch. The package has a copy of that class, which reads the same weights.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image

from eval.judges import pins
from eval.judges.base import BaseJudge, Probe, device, libraries, package_folder, unit_pixels
from eval.judges.stand_ins import importable, module, torchvision
from eval.judging.protocols import Request

if TYPE_CHECKING:
    import torch

RELEASE = "0.2.1"
SIZE_PX = 224
EMBEDDING_WIDTH = 768 + 512 + 512  # of the released ensemble: DINO's class token, two CLIP projections
DINO = "checkpoints/dino_vitbase16_pretrain.pth"  # where torch.hub puts it
ADAPTER = "ensemble_lora/adapter_config.json", "ensemble_lora/adapter_model.safetensors"
PLAIN_LORA = {"bias": "none", "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}


class DreamSim(BaseJudge):
    """See eval.judging.protocols.Judge ("diversity"): the distances of all pairs of tiles, (0, 1), (0, 2), ..., black ones left out.

    Args:
        at: the directory that `dreamsim(cache_dir=DIR)` fills (docs/evaluation.md).

    Raises:
        ValueError: the package is not installed, or the directory lacks a file.
    """

    name = "dreamsim"
    model = f"dreamsim {RELEASE}, ensemble, of a directory"
    OFFICIAL = f"dreamsim {RELEASE}, ensemble"
    FILES = (DINO, "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar", *ADAPTER)

    def __init__(self, at: str = ""):
        versions = libraries("dreamsim")
        identities = pins.digests(Path(at), self.FILES, self.name)
        with dreamsim_package() as package:
            model = build(package, Path(at), device())
        self._assemble(model, {name: f"sha256:{digest}" for name, digest in identities.items()})
        released = model.embed_size == EMBEDDING_WIDTH and versions["dreamsim"] == RELEASE
        if released and pins.is_pinned(self.name, identities):
            self.model = self.OFFICIAL

    def _assemble(self, model: Any, identities: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        super().__init__(
            {
                "class": "dreamsim.PerceptualModel (ensemble)",
                "weights": identities,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "attention": "the package's own",
                "processor": f"RGB, {SIZE_PX} x {SIZE_PX} px, bicubic, [0, 1]",
                "decoding": "1 - cosine of normalised embeddings",
                "libraries": libraries("dreamsim", "torch", "pillow", "numpy"),
            }
        )

    @classmethod
    def of(cls, model: Any, identity: str) -> DreamSim:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, identity)
        return judge

    def embed(self, image: Image.Image) -> torch.Tensor:
        """[1, width] float32. One image at a time, as the official code does."""
        import torch

        with torch.inference_mode():
            return self._model.embed(torch.from_numpy(unit_pixels(image, SIZE_PX))[None].to(self._model.device))

    def answer_one(self, request: Request) -> list[float]:
        import torch

        tiles = [image.convert("RGB") for image in request.images]
        embeddings = [self.embed(tile) for tile in tiles if tile.getbbox() is not None]
        pairs = itertools.combinations(embeddings, 2)
        return [float(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)) for a, b in pairs]

    def probes(self) -> list[Probe]:
        red, blue = (Image.new("RGB", (96, 96), color) for color in ((230, 10, 10), (10, 10, 230)))
        return [Probe(Request([red, red], ""), [0.0]), Probe(Request([red, blue], ""))]


@contextmanager
def dreamsim_package() -> Iterator[ModuleType]:
    """The module dreamsim.model, imported without torchvision, peft and open_clip unless torchvision really imports.

    The package uses peft only for what `build` does here, and open_clip only in a check that is never called.

    Raises:
        ValueError: dreamsim is not installed.
    """
    package_folder("dreamsim", "dreamsim")
    from transformers import ViTMAEModel  # noqa: F401  the package imports it: now, while transformers sees what is there

    unused = dict.fromkeys(("LoraConfig", "PeftModel", "get_peft_model"))
    absent = {"peft": module("peft", __version__="0.2.0", **unused), "open_clip": module("open_clip")}
    with importable({**torchvision(), **absent}, library="dreamsim"):
        yield importlib.import_module("dreamsim.model")


def build(package: ModuleType, folder: Path, place: str) -> Any:
    """The released ensemble, from the files in `folder` alone.

    Args:
        package: the module dreamsim.model.

    Raises:
        ValueError: weights that do not fit.
    """
    import torch

    extractor = package.ViTExtractor
    others = extractor.create_model

    def create_model(model_type: str, load_dir: str) -> Any:
        if model_type != "dino_vitb16":
            return others(model_type, load_dir)  # torch.load(weights_only=True) inside
        towers = importlib.import_module("dreamsim.feature_extraction.vision_transformer")
        tower = towers.vit_base(patch_size=16)
        tower.load_state_dict(torch.load(folder / DINO, map_location="cpu", weights_only=True))
        return tower

    extractor.create_model = staticmethod(create_model)
    try:
        settings = package.dreamsim_args["model_config"]["ensemble"]
        model = package.PerceptualModel(**settings, load_dir=str(folder), device=place, normalize_embeds=True)
    except Exception as error:  # pickles fail in many ways
        raise ValueError(f"{folder} has no weights of DreamSim's ensemble ({type(error).__name__}): {error}") from error
    finally:
        extractor.create_model = staticmethod(others)
    add_lora(model, *(folder / name for name in ADAPTER))
    return model.to(place)


def add_lora(model: Any, config_path: Path, weights_path: Path) -> None:
    """Adds an adapter of PEFT's file format to the linear layers that it names: y = W x + b + (alpha / r) B A x.

    Raises:
        ValueError: another kind of adapter, or weights that are not those of these layers.
    """
    import torch
    from safetensors.torch import load_file

    config = json.loads(config_path.read_text(encoding="utf-8"))
    other = {key: config[key] for key, plain in PLAIN_LORA.items() if config.get(key, plain) not in (plain, None)}
    targets = config.get("target_modules")
    if missing := [key for key in ("lora_alpha", "r", "target_modules") if key not in config]:
        raise ValueError(f"{config_path} lacks {', '.join(missing)}: it is no LoRA adapter")
    if other or isinstance(targets, str):
        raise ValueError(f"{config_path} must be a plain LoRA with a list of target_modules, not {other or targets!r}")
    weights = {
        name.removeprefix("base_model.model."): tensor.float() for name, tensor in load_file(weights_path).items()
    }
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    }
    wanted = {f"{name}.lora_{part}.weight" for name in layers for part in "AB"}
    if not layers or weights.keys() != wanted:
        raise ValueError(
            f"{weights_path} must have two tensors for each of {len(layers)} layers {', '.join(targets)}; "
            f"it has others: {', '.join(sorted(weights.keys() ^ wanted)[:3])}"
        )
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        a, b = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        setattr(model.get_submodule(parent), child, _lora_linear(layer, a, b, config["lora_alpha"] / config["r"]))


def _lora_linear(base: Any, a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    import torch

    class LoRALinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = base, torch.nn.Parameter(a), torch.nn.Parameter(b)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            linear = torch.nn.functional.linear
            return self.base(x) + linear(linear(x, self.a), self.b) * scale

    return LoRALinear()
