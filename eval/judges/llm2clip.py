"""OneIG's judge of reasoning: LLM2CLIP, a CLIP whose text tower is a Llama that sees both directions.

text --LlamaModel, both directions--> mean of its tokens --LLM2CLIP's adapter--> embedding }
image ------------------------------LLM2CLIP's vision tower------------------> embedding } cosine

LLM2CLIP's own class is code of its Hub repository. It runs only at the named commit: review it first.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from PIL import Image

from eval.judges.base import BaseJudge, Probe, device, libraries, only_image, resolve
from eval.judging.protocols import Request

if TYPE_CHECKING:
    import torch

REPOSITORY = "microsoft/LLM2CLIP-Openai-L-14-336"
TEXT_REPOSITORY = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
IMAGE_PROCESSOR = "openai/clip-vit-large-patch14-336"
HEADER, END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
MAX_TOKENS = 512


def bidirectional(model: Any) -> Any:
    """Lets every token of a `LlamaModel` attend to every other.

    Both switches are needed: with the layers' alone, the mask for padding is causal again.
    """
    model.config.is_causal = False
    for layer in model.layers:
        layer.self_attn.is_causal = False
    return model


def embed_texts(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """LLM2Vec's embeddings, float32 [texts, D]: the mean over the tokens of the text and its end, without the header.

    Args:
        model: of `bidirectional`.
        tokenizer: of the checkpoint; texts of several lengths are padded left.
    """
    import torch

    tokenizer.padding_side = "left"  # so that the text's own tokens are the last ones
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bodies = [text.strip() + END for text in texts]
    settings: dict[str, Any] = {"truncation": True, "max_length": MAX_TOKENS}
    whole = tokenizer([HEADER + body for body in bodies], padding=True, return_tensors="pt", **settings)
    lengths = [len(tokenizer(body, add_special_tokens=False, **settings)["input_ids"]) for body in bodies]
    with torch.inference_mode():
        out = model(
            input_ids=whole["input_ids"].to(model.device), attention_mask=whole["attention_mask"].to(model.device)
        ).last_hidden_state
    return torch.stack([row[-length:].mean(dim=0) for row, length in zip(out, lengths, strict=True)]).float()


class LLM2CLIP(BaseJudge):
    """See eval.judging.protocols.Judge. The answer is the cosine of the image and the request's text.

    Args:
        at: the commit of LLM2CLIP's repository (40 hexadecimal digits), since its code is run.

    Raises:
        ValueError: no commit is named, or the weights are not there.
    """

    name = "llm2clip"
    model = "microsoft/LLM2CLIP-Openai-L-14-336 with LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned, pooled here"

    def __init__(self, at: str = ""):
        if not re.fullmatch(r"[0-9a-f]{40}", at):
            raise ValueError(
                f"judge {self.name} runs code of {REPOSITORY}: review a commit and name it, as {self.name}@COMMIT "
                f"(40 hexadecimal digits, not {at!r})"
            )
        import torch
        from transformers import AutoModel, AutoTokenizer, LlamaModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        clip_weights, text_weights, processor_weights = (
            resolve(REPOSITORY, at), resolve(TEXT_REPOSITORY), resolve(IMAGE_PROCESSOR)
        )  # fmt: skip
        clip = AutoModel.from_pretrained(
            REPOSITORY,
            revision=at,
            code_revision=at,
            trust_remote_code=True,
            dtype=torch.bfloat16,
            use_safetensors=True,
        )
        llama = LlamaModel.from_pretrained(
            TEXT_REPOSITORY, revision=text_weights.revision, dtype=torch.bfloat16, use_safetensors=True
        )
        self._assemble(
            clip.to(device()),
            llama.to(device()),
            AutoTokenizer.from_pretrained(TEXT_REPOSITORY, revision=text_weights.revision),
            CLIPImageProcessorPil.from_pretrained(IMAGE_PROCESSOR, revision=processor_weights.revision),
            {"clip": clip_weights.identity, "text": text_weights.identity, "processor": processor_weights.identity},
        )

    def _assemble(self, clip: Any, llama: Any, tokenizer: Any, processor: Any, identities: dict[str, str]) -> None:
        self._clip, self._llama = clip.eval(), bidirectional(llama.eval())
        self._tokenizer, self._processor = tokenizer, processor
        self._texts: dict[str, torch.Tensor] = {}
        super().__init__(
            {
                "class": "LLM2CLIP's own (remote code), transformers.LlamaModel in both directions",
                "weights": identities,
                "dtype": f"{llama.dtype}, the towers' heads under autocast".replace("torch.", ""),
                "attention": llama.config._attn_implementation,
                "processor": "CLIPImageProcessorPil",
                "decoding": f"cosine; text: mean over its tokens and {END}, at most {MAX_TOKENS}",
                "libraries": libraries("torch", "transformers", "pillow"),
            }
        )

    @classmethod
    def of(cls, clip: Any, llama: Any, tokenizer: Any, processor: Any, identities: dict[str, str]) -> LLM2CLIP:
        """The judge of models that are loaded already; `clip` has LLM2CLIP's `get_image_features`, `get_text_features`."""
        judge = cls.__new__(cls)
        judge._assemble(clip, llama, tokenizer, processor, identities)
        return judge

    def answer_one(self, request: Request) -> float:
        import torch

        where = self._llama.device
        if request.text not in self._texts:
            self._texts[request.text] = embed_texts(self._llama, self._tokenizer, [request.text])
        pixels = self._processor(images=[only_image(request)], return_tensors="pt")["pixel_values"]
        with torch.inference_mode(), torch.autocast(where.type):
            features = [
                self._clip.get_image_features(pixels.to(where)),
                self._clip.get_text_features(self._texts[request.text].to(where)),
            ]
            image, text = (f / f.norm(dim=-1, keepdim=True) for f in features)
            return float((image @ text.T)[0, 0])

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (336, 336), (230, 10, 10))
        return [Probe(Request([red], text)) for text in ("a plain red surface", "a plain blue surface")]
