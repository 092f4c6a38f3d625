"""Writes the model card, README.md of a published pipeline, from the recipe, the scorecard and the lineage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from eval.scorecards.card import Counts, model_index
from model.constants import PIPELINE_TEXT_STATE

PAPER = "https://arxiv.org/abs/2604.12163"


def model_card(
    recipe: dict[str, Any],
    scorecard: dict[str, Any] | None,
    lineage: list[dict[str, Any]],
    has_grid: bool = False,
    further: Sequence[dict[str, Any]] = (),
) -> str:
    """Markdown with the Hub's YAML header.

    Args:
        recipe: the complete recipe as `Recipe.model_dump(mode="json")`.
        scorecard: the dict of eval.scorecard; None if the model was not scored, which the card then states.
        lineage: rows of tasks.trace.lineage_rows.
        has_grid: whether the directory contains grid.png.
        further: scorecards of further benchmarks.
    """
    publish = recipe["publish"]
    header = {
        "license": publish["license"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "mixture-of-experts", "flow-matching", "nucleus-image"],
    }
    if scorecard is not None:
        entries = [model_index(card, publish["title"]) for card in (scorecard, *further)]
        header["model-index"] = [{**entries[0], "results": [row for entry in entries for row in entry["results"]]}]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {_text(publish['title'])}\n",
        _what(recipe),
        "![Prompts and generated images](grid.png)\n" if has_grid else "",
        _usage(recipe),
        "## Scores\n",
        "Not scored.\n" if scorecard is None else _headlines([scorecard, *further]) if further else "",
        *(_scores(card) + "\n" + _spread(recipe, card) for card in (scorecard, *further) if card is not None),
        _how(recipe),
        _lineage(lineage),
        _limits(recipe, scorecard),
        f"## Licence\n\nThis directory: {_text(publish['license'])}. {_components_licence(recipe)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(value: Any) -> str:
    """Escapes a value from data for Markdown: one line without markup, links or HTML."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", line)


def _code(value: Any) -> str:
    """A value from data as a code span, in which Markdown has no escapes: without characters that end it or a cell."""
    return f"`{re.sub('[`|<>]', '', ' '.join(str(value).split()))}`"


def _layers(recipe: dict[str, Any]) -> tuple[int, int]:
    """(dense blocks, MoE blocks)."""
    from model.config import TransformerConfig

    model = TransformerConfig(**recipe["model"])
    moe = sum(model.is_moe_layer(i) for i in range(model.num_layers))
    return model.num_layers - moe, moe


def _what(recipe: dict[str, Any]) -> str:
    model = recipe["model"]
    dense, moe = _layers(recipe)
    width = model["num_attention_heads"] * model["attention_head_dim"]
    kv_heads = model["num_key_value_heads"] or model["num_attention_heads"]
    encoder = recipe["components"]
    if encoder["kind"] == "hub":
        vae, text = encoder["hub_vae"], encoder["hub_text_encoder"]
        parts = f"VAE of {_component(vae)}, text encoder {_component(text)}"
    else:
        parts = "a small VAE and a small text encoder of the released classes, trained on the same corpus"
    return (
        f"A text-to-image diffusion transformer with expert-choice routing, after [Nucleus-Image]({PAPER}), trained with "
        f"the recipe `{_text(recipe['name'])}`.\n\n"
        f"- Transformer: {model['num_layers']} blocks ({dense} dense, {moe} MoE), width {width}, "
        f"{model['num_attention_heads']} heads ({kv_heads} KV) of {model['attention_head_dim']}, "
        f"{model['num_experts']} routed experts and 1 shared in each MoE block\n"
        f"- Frozen: {parts}\n"
        f"- Conditioning: text hidden state {recipe['encoding']['hidden_state_index']} of the chat-formatted prompt\n"
        f"- Class: `NucleusMoEImagePipeline` of diffusers\n"
    )


def _usage(recipe: dict[str, Any]) -> str:
    scores = recipe["eval"]
    size, index = scores["image_size_px"], recipe["encoding"]["hidden_state_index"]
    extra = "" if index == PIPELINE_TEXT_STATE else f"\n    return_index={index},"
    stochastic = scores["scheduler"]["stochastic_sampling"]
    seeding = "torch.manual_seed(0)  # the scheduler adds noise at each step\n" if stochastic else ""
    dtype = "bfloat16" if recipe["train"]["dtype"] == "bfloat16" else "float32"
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline, TextKVCacheConfig

pipe = DiffusionPipeline.from_pretrained("PATH_OR_REPO_ID", torch_dtype=torch.{dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.transformer.enable_cache(TextKVCacheConfig())  # computes text keys and values once, not at every step; same images

{seeding}image = pipe(
    "a photo of a red circle left of a blue square",
    height={size},
    width={size},
    num_inference_steps={scores["num_inference_steps"]},
    guidance_scale={scores["guidance_scale"]},{extra}
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
```

Give `height` and `width`: the pipeline's default of 1024 x 1024 does not depend on the model. This model was
trained at {", ".join(str(stage["image_size_px"]) for stage in recipe["train"]["stages"])} px, and scored at {size} px
with the settings above. Sizes are multiples of {8 * recipe["model"]["patch_size"]}.
"""


def _headlines(cards: Sequence[dict[str, Any]]) -> str:
    """The overall scores of several benchmarks, as the first table of the card."""
    lines = ["| score | overall | deviation | interval | prompts | images |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [_row(_code(card["name"]), card["overall"], card.get("scale", 1.0)) for card in cards]
    return "\n".join(lines) + "\n"


def _scores(scorecard: dict[str, Any]) -> str:
    overall, scale = scorecard["overall"], scorecard.get("scale", 1.0)
    seeds = ", ".join(str(seed) for seed in overall["seeds"])
    counts = scorecard["counts"]
    interval = scorecard["interval"]
    others = Counts(**counts).not_judged
    not_judged = f", {others} without a judge of their score" if others else ""
    lines = [
        f"Score {_code(scorecard['name'])}; {overall['runs']} runs (seeds {seeds}); {counts['scored']} of "
        f"{counts['expected']} images scored, {counts['failed']} failed{not_judged}. Deviation: standard deviation over seeds. "
        f"Interval: {interval['level']:.0%}, over prompts ({_text(interval['method'])}).\n",
        "| task | mean | deviation | interval | prompts | images |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(_text(name), score, scale) for name, score in scorecard["tasks"].items()),
        _row("**overall**", overall, scale),
    ]
    held_out = scorecard.get("held_out")
    if held_out:
        lines += [
            "",
            "Held-out prompts (combinations that occur in no training caption), scored separately:\n",
            "| task | mean | deviation | interval | prompts | images |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_row(_text(name), score, scale) for name, score in held_out["tasks"].items()),
            _row("**overall**", held_out["overall"], scale),
        ]
    measures = [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in scorecard.get("measures", {}).items()]
    measures += [
        f"held-out flow loss at timestep {row['timestep']:g}: {row['loss']:.4f}"
        for row in scorecard.get("flow_loss", [])
    ]
    if measures:
        lines += ["", *(f"- {_text(text)}" for text in measures)]
    return "\n".join(lines) + "\n"


def _spread(recipe: dict[str, Any], scorecard: dict[str, Any]) -> str:
    """Standard errors of the overall score by their source, and the command that measures each."""
    noise, name, scale = scorecard["overall"]["noise"], _text(recipe["name"]), scorecard.get("scale", 1.0)
    benchmark = _text(scorecard["benchmark"])
    evaluate = f"pyflyte run workflows/evaluate.py evaluate --model DIR --benchmarks {benchmark} --recipe {name}"
    study = f'pyflyte run workflows/study.py study --recipe {name} --variants "" --seeds 0,1,2,3,4'
    if scorecard["benchmark"] != recipe["eval"]["benchmark"]:  # a study scores the recipe's first benchmark
        study = "python -m eval.cli score RUN --training-runs CARD ..."
    training = f"not measured here: these weights are one training, seed {recipe['train']['seed']}"
    if noise["training"] is not None:
        training = f"{scale * noise['training']:.3f} over {noise['training_runs']} trainings"
    sampling, prompts = (
        "not measured" if noise[kind] is None else f"{scale * noise[kind]:.3f}" for kind in ("sampling", "prompts")
    )
    return "\n".join(
        [
            "Where the overall score would move:\n",
            "| with other | standard error | command, in the project |",
            "| --- | --- | --- |",
            f"| noise on the same prompts | {sampling} | `{evaluate}` |",
            f"| prompts of the same kind | {prompts} | the same |",
            f"| training seeds | {training} | `{study}` |",
            "",
        ]
    )


def _row(name: str, score: dict[str, Any], scale: float) -> str:
    """A row of the table of scores, on the benchmark's own scale, on which its papers print."""
    deviation = "one run" if score["std"] is None else f"{scale * score['std']:.3f}"
    low, high = (scale * limit for limit in score["interval"])
    counts = f"{score.get('prompts', '')} | {score.get('images', '')}"
    return f"| {name} | {scale * score['mean']:.3f} | {deviation} | {low:.3f} to {high:.3f} | {counts} |"


def _how(recipe: dict[str, Any]) -> str:
    train, optim, losses = recipe["train"], recipe["train"]["optim"], recipe["train"]["losses"]
    rows = []
    for stage in train["stages"]:
        factors = stage["capacity_factors"]
        shown = (
            f"{factors:g}" if isinstance(factors, (int, float)) else f"{max(factors):g} to {min(factors):g} by layer"
        )
        rows.append(
            f"| {_text(stage['name'])} | {stage['image_size_px']} | {stage['steps']:,} | {stage['batch_size']:,} | "
            f"{shown} | {len(stage['aspect_ratios'])} |"
        )
    extra = [
        f"{name} {losses[key]:g}"
        for name, key in (
            ("router z-loss", "router_z_loss"),
            ("router orthogonality", "router_orthogonality"),
            ("wavelet loss at the last stage", "wavelet"),
        )
        if losses[key]
    ]
    each = "" if train["carry_optimizer"] else " in each stage"
    decays = [
        f", falling linearly to {stage['decay']['to']:.0%} over the last {stage['decay']['steps']:,} steps of {_text(stage['name'])}"
        for stage in train["stages"]
        if stage["decay"]
    ]
    guided = [
        f"- Guidance of scale {stage['guidance']['scale']:g} trained in (model guidance, arXiv 2502.12154) over the last "
        f"{stage['guidance']['steps']:,} steps of {_text(stage['name'])}: sample without guidance (guidance_scale=1)"
        for stage in train["stages"]
        if stage["guidance"]
    ]
    merged = "" if decays else ", instead of a learning-rate decay"
    return "\n".join(
        [
            "## How it was made\n",
            "Rectified flow with velocity prediction; logit-normal timesteps whose shift rises with the number of tokens.\n",
            "| stage | px | steps | global batch | capacity factor | aspect ratios |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"- Muon (rate {optim['muon_lr']:g}, momentum {optim['muon_momentum']:g}) for attention and expert matrices, "
            f"AdamW (rate {optim['adamw_lr']:g}) for the rest; {optim['warmup_steps']:,} steps of warm-up{each}, then constant"
            + "".join(decays),
            *guided,
            f"- Merged offline from at most the last {recipe['merge']['last_n']} checkpoints (Warmup-Stable-Merge, "
            f"arXiv 2507.17634){merged}",
            f"- Captions dropped: {train['caption_dropout']:.0%}; extra losses: {', '.join(extra) or 'none'}",
            "- No reinforcement learning, preference tuning or load-balancing loss",
            "",
        ]
    )


def _lineage(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "## Lineage\n\nUnknown: the source directories are not sealed.\n"
    table = [
        f"| {_text(row['kind'])} | `{row['digest']}` | "
        f"{_text(', '.join(f'{value:,} {name}' for name, value in row['counts'].items()))} | {_text(row['code_version'])} |"
        for row in rows
    ]
    return "\n".join(
        [
            "## Lineage\n",
            "All artifacts that these weights were made from, with their digests. `python -m tasks.trace DIR` of the "
            "project verifies all of them, back to the id of each record. `sha256sum -c SHA256SUMS` verifies only this "
            "directory.\n",
            "| kind | digest | counts | code |",
            "| --- | --- | --- | --- |",
            *table,
            "",
        ]
    )


def _limits(recipe: dict[str, Any], scorecard: dict[str, Any] | None) -> str:
    source = recipe["source"]
    lines = ["## Limits\n"]
    if recipe["components"]["kind"] == "trained":
        lines.append(
            "- The model was trained on a small corpus only: other subjects, styles or words give meaningless images. Its "
            "purpose is to show that the complete pipeline works."
        )
        if source["scenes"]:
            lines.append(
                "- The corpus contains rendered scenes of coloured shapes; prompts should follow their wording."
            )
        if source["digits"] or source.get("made", {}).get("digits"):
            lines.append("- The corpus contains scans of handwritten digits.")
        lines += [
            f"- The corpus contains made records of {name!r}." for name in source.get("made", {}) if name != "digits"
        ]
    else:
        lines.append("- It reproduces the content of its training images and captions, with their biases and gaps.")
        lines.append("- People, hands, long texts and exact counts are known weaknesses of models of this family.")
    if scorecard is None:
        lines.append("- Nothing here was measured.")
    else:
        lines.append(
            "- The scores hold for the benchmark, sampler and guidance named above; differences within the intervals are "
            "noise."
        )
    lines.append("- The pipeline has no safety filter.")
    return "\n".join(lines) + "\n"


def _components_licence(recipe: dict[str, Any]) -> str:
    if recipe["components"]["kind"] != "hub":
        return "The recipe trained all of its parts."
    vae, text = recipe["components"]["hub_vae"], recipe["components"]["hub_text_encoder"]
    names = " and ".join(_text(part["repo_id"]) if _is_pinned(part) else "a local directory" for part in (vae, text))
    return f"It contains unchanged parts of {names}, under their own licences."


def _is_pinned(component: dict[str, Any]) -> bool:
    """Whether a component is from a Hub repository; ./NAME and /NAME are local directories without a commit."""
    return not component["repo_id"].startswith(("./", "/"))


def _component(component: dict[str, Any]) -> str:
    if not _is_pinned(component):
        return "a local directory"
    return f"{_text(component['repo_id'])} at `{component['revision']}`"
