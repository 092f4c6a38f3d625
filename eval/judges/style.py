"""OneIG's judge of style: the nearest of three references per style, by two encoders.

CSD             CLIP ViT-L/14's tower in float32, then a 1024 x 768 matrix
style encoder   xingpng/OneIG-StyleEncoder, a CLIP vision tower with projection (1280), in bfloat16

CSD's weights and the references are published as pickles. They are converted once, into a directory that is read from then on:

    python -m eval.judges.style checkpoint.pth CSD_embed.pt SE_embed.pt OUT
        OUT/csd.safetensors         tower and matrix
            references.safetensors  "csd/<style>" [3, 768] and "se/<style>" [3, 1280]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from eval import oneig
from eval.judges.base import BaseJudge, Probe, clip_pixels, device, file_sha256, libraries, only_image, resolve
from eval.judging.protocols import Request

if TYPE_CHECKING:
    import torch

ENCODER = "xingpng/OneIG-StyleEncoder"
CSD, REFERENCES, HEAD = "csd.safetensors", "references.safetensors", "last_layer_style"


def convert_csd(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CSD's `model_state_dict` (OpenAI's names) as that of a `CLIPVisionModel`, and the style matrix.

    Raises:
        ValueError: a tensor is missing.
    """
    state = {name.removeprefix("module.").removeprefix("backbone."): tensor.float() for name, tensor in state.items()}
    try:
        converted = {
            "embeddings.class_embedding": state["class_embedding"],
            "embeddings.patch_embedding.weight": state["conv1.weight"],
            "embeddings.position_embedding.weight": state["positional_embedding"],
            HEAD: state[HEAD],
        }
        for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
            for kind in ("weight", "bias"):
                converted[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        blocks = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
        names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
        names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        for block in sorted(blocks, key=int):
            old, new = f"transformer.resblocks.{block}.", f"encoder.layers.{block}."
            for kind in ("weight", "bias"):
                parts = state[f"{old}attn.in_proj_{kind}"].chunk(3)
                converted |= {f"{new}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", parts, strict=True)}
                converted |= {f"{new}{ours}.{kind}": state[f"{old}{theirs}.{kind}"] for theirs, ours in names.items()}
    except KeyError as error:
        raise ValueError(f"the checkpoint of CSD has no tensor {error.args[0]!r}") from None
    return {name: tensor.contiguous().clone() for name, tensor in converted.items()}


class OneIGStyle(BaseJudge):
    """See eval.judging.protocols.Judge. The answer is `eval.oneig.style_score` against the references of options["style"].

    The Hub's encoder is OneIG's own; CSD's weights come from a directory, so the name is never the official one.

    Args:
        at: the directory that `python -m eval.judges.style` wrote.

    Raises:
        ValueError: no such directory, or the encoder is not there.
    """

    name = "oneig-style"
    model = "CSD ViT-L (converted) and xingpng/OneIG-StyleEncoder"

    def __init__(self, at: str = ""):
        missing = [name for name in (CSD, REFERENCES) if not (Path(at) / name).is_file()]
        if missing:
            raise ValueError(
                f"judge {self.name} needs a directory with {CSD} and {REFERENCES}, as {self.name}@DIR; {at or 'none'!r} "
                f"has no {missing[0]}: python -m eval.judges.style writes it"
            )
        import torch
        from safetensors.torch import load_file
        from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        weights = resolve(ENCODER)
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                image_size=224, patch_size=14, projection_dim=768, hidden_act="quick_gelu",
            )
        )  # fmt: skip
        state = load_file(Path(at) / CSD)
        head = state.pop(HEAD)
        load_tower(tower, state)
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            ENCODER, revision=weights.revision, dtype=torch.bfloat16, use_safetensors=True
        )
        self._assemble(
            tower.to(device()),
            head.to(device()),
            encoder.to(device()),
            CLIPImageProcessorPil(),
            load_file(Path(at) / REFERENCES),
            {
                "csd": f"sha256:{file_sha256(Path(at) / CSD)}",
                "encoder": weights.identity,
                "references": f"sha256:{file_sha256(Path(at) / REFERENCES)}",
            },
        )

    def _assemble(
        self, tower: Any, head: Any, encoder: Any, processor: Any, references: Any, identities: dict[str, str]
    ) -> None:
        self._tower, self._head, self._encoder = tower.eval(), head, encoder.eval()
        self._processor, self._references = processor, references
        super().__init__(
            {
                "class": "transformers.CLIPVisionModel x matrix, transformers.CLIPVisionModelWithProjection",
                "weights": identities,
                "dtype": f"{tower.dtype} and {encoder.dtype}".replace("torch.", ""),
                "attention": encoder.config._attn_implementation,
                "processor": "short side to 224 px, bicubic, the middle",
                "decoding": "eval.oneig.style_score",
                "libraries": libraries("torch", "transformers", "pillow", "numpy"),
            }
        )

    @classmethod
    def of(
        cls, tower: Any, head: Any, encoder: Any, processor: Any, references: Any, identities: dict[str, str]
    ) -> OneIGStyle:
        """The judge of models that are loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(tower, head, encoder, processor, references, identities)
        return judge

    def answer_one(self, request: Request) -> float:
        import torch

        style = request.options["style"]
        known = sorted(name.removeprefix("csd/") for name in self._references if name.startswith("csd/"))
        if style not in known:
            raise ValueError(f"there are no references of style {style!r}; there are {', '.join(known)}")
        image = only_image(request)
        with torch.inference_mode():
            pixels = torch.from_numpy(clip_pixels(image, self._tower.config.image_size))[None].to(self._tower.device)
            csd = self._tower(pixel_values=pixels).pooler_output @ self._head
            inputs = self._processor(images=image, return_tensors="pt")["pixel_values"]
            se = self._encoder(inputs.to(self._encoder.device, self._encoder.dtype)).image_embeds
            csd, se = (torch.nn.functional.normalize(x, dim=-1).float().cpu() for x in (csd, se))
        references = (self._references[f"{kind}/{style}"].float() for kind in ("csd", "se"))
        score = oneig.style_score(csd, se, *references)
        assert score is not None, "one tile"
        return float(score)

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (224, 224), (230, 10, 10))
        style = next(name.removeprefix("csd/") for name in sorted(self._references) if name.startswith("csd/"))
        return [Probe(Request([red], "", {"style": style}))]


def load_tower(tower: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Loads `convert_csd`'s tensors into a `CLIPVisionModel`, with any prefix of its parameter names."""
    names = list(tower.state_dict())
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    import torch
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="python -m eval.judges.style", description="Converts CSD and the references.")
    for name in ("checkpoint", "csd_embed", "se_embed", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of CSD's training arguments
            loaded = [
                torch.load(path, map_location="cpu", weights_only=True)
                for path in (options.checkpoint, options.csd_embed, options.se_embed)
            ]
        csd = convert_csd(loaded[0]["model_state_dict"])
        references = {
            f"{kind}/{style}": torch.as_tensor(tensor).contiguous().clone()
            for kind, table in zip(("csd", "se"), loaded[1:], strict=True)
            for style, tensor in table.items()
        }
    except Exception as error:  # a pickle may raise any error; one that needs other classes is refused
        print(f"error: not CSD's checkpoint and OneIG's references: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((CSD, csd), (REFERENCES, references)):
        temporary = options.out / f".{name}"
        save_file(tensors, temporary)
        temporary.replace(options.out / name)
    print(f"{options.out}: CSD, and references of {len(loaded[1])} styles")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
