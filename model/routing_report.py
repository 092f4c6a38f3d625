"""Reports how a model routes the tokens of real images: stability over timesteps, expert diversity, compute allocation.

    python -m model.routing_report CHECKPOINT --latents DIR --out DIR [--images 4] [--timesteps 8] [--seed 0] [--device cpu]

CHECKPOINT is a transformer directory, an artifact that contains one (merged, pipeline), a checkpoints artifact, the
weights/ folder of a running stage, or one checkpoint in either of these two, local or in s3://. Each image is noised with
one noise sample, and the model sees it at falling timesteps, from 0.95 to 0.05.

For one token in one layer, A(t) is the set of experts that take it at timestep t, and w(t) the vector of their gates, 0 for
other experts:

    jaccard      |A(t) & A(t')| / |A(t) | A(t')| of neighbouring timesteps; 1 where both sets are empty
    cosine       cosine of w(t) and w(t'); 1 where both are 0, and 0 where only one is
    experts      |A(t)|: the allocation map; with expert choice, its mean over tokens is the capacity factor
    distinct     |union of A(t) over all t|

A value of 1 means stable routing. If each expert took a token with probability p, independently at each timestep, the mean
intersection over the mean union would be p / (2 - p): `jaccard_by_chance`. Diversity of the experts:

    router_row_cosine      mean |cosine| over pairs of a router's rows [E, 2D]: 0 orthogonal, 1 parallel
    expert_output_cosine   mean cosine over pairs of experts of their outputs for the same token, routed to them or not:
                           1 if all experts compute the same function

This project defines these metrics; they are not taken from a paper.

Writes routing.json (means), maps.safetensors (`layer03/experts` [images, timesteps, rows, columns], `layer03/jaccard`
and `layer03/distinct` [images, rows, columns]), image*.png (these maps) and stability.png.

Shape suffixes: T timesteps, B images, S tokens, E experts, D width, N tokens of several images.
The reasons are in docs/decisions/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from model import flow, storage
from model.config import TransformerConfig
from model.data.latents import LatentDataset
from model.layers.moe import Experts
from model.transformer import NucleusTransformer, RouterTrace
from model.weights.checkpoints import last_checkpoint
from model.weights.export import assembled, load_transformer
from model.weights.load import open_weights

OUTPUT_TOKENS = 256  # number of tokens per layer that all experts process, for expert_output_cosine


class LayerRouting(NamedTuple):
    """Routing of the same images by one MoE layer at each timestep. `inputs_ND` is a sample of the experts' inputs."""

    weights_TBSE: torch.Tensor
    taken_TBSE: torch.Tensor
    inputs_ND: torch.Tensor


def jaccard(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jaccard index of two sets of experts, boolean [..., E] -> [...]; 1 where both are empty."""
    union = (one | other).sum(-1)
    return torch.where(union > 0, (one & other).sum(-1) / union.clamp_min(1), 1.0)


def gate_cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of two vectors of gates [..., E] -> [...]; 1 where both are 0, 0 where only one is."""
    silent = (one == 0).all(-1) & (other == 0).all(-1)
    return torch.where(silent, 1.0, torch.cosine_similarity(one.double(), other.double(), dim=-1).float())


def mean_pair_cosine(vectors: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """Mean cosine (or its absolute value) over the pairs of E vectors [..., E, D] -> [...].

    Raises:
        ValueError: there are fewer than two vectors.
    """
    E = vectors.shape[-2]
    if E < 2:
        raise ValueError(f"pairs need at least two experts, got {E}")
    directions = torch.nn.functional.normalize(vectors.float(), dim=-1)
    cosines = directions @ directions.mT
    cosines = cosines.abs() if absolute else cosines
    return (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (E * (E - 1))


@torch.no_grad()
def expert_output_cosine(experts: Experts, inputs_ND: torch.Tensor) -> float:
    """Cosine of two experts' outputs for one token, averaged over pairs of experts and over tokens."""
    E = experts.gate_up_proj.shape[0]
    outputs_END = experts(inputs_ND.expand(E, *inputs_ND.shape))
    return mean_pair_cosine(outputs_END.transpose(0, 1)).mean().item()


@torch.no_grad()
def watch_routing(
    model: NucleusTransformer,
    clean: torch.Tensor,
    noise: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None,
    timesteps: list[float],
) -> dict[int, LayerRouting]:
    """The routing of each MoE layer (keys are block indices) for the latents `clean` [B, C, h, w] mixed with `noise`.

    Args:
        text, mask: [B, tokens, joint_attention_dim] and [B, tokens], true for real tokens, or None if all are real.
        timesteps: in [0, 1], 1 is noise.

    Raises:
        ValueError: the model has no routers.
    """
    patch = model.config.patch_size
    every = max(1, len(timesteps) * clean[:, 0].numel() // patch**2 // OUTPUT_TOKENS)
    rows, columns = (side // patch for side in clean.shape[-2:])
    clean_BSC, noise_BSC = flow.pack_latents(clean, patch), flow.pack_latents(noise, patch)
    seen: dict[int, list[torch.Tensor]] = {}

    def some(layer: int, inputs_ND: torch.Tensor) -> None:
        """Every `every`-th token, counted across timesteps. All tokens of a 17B model would fill a GPU."""
        kept = seen.setdefault(layer, [])
        kept.append(inputs_ND[-len(kept) * len(inputs_ND) % every :: every].clone())

    hooks = [
        block.img_mlp.register_forward_pre_hook(
            lambda module, inputs, layer=layer: some(layer, inputs[0].flatten(0, 1))
        )
        for layer, block in enumerate(model.transformer_blocks)
        if block.moe_enabled
    ]
    if not hooks:
        raise ValueError("this model has no MoE layer, so it has no routing to report")
    traces = []
    try:
        for value in timesteps:
            t_B = torch.full((len(clean),), value, device=clean.device)
            trace = RouterTrace()
            model(
                hidden_states=flow.interpolate(clean_BSC, noise_BSC, t_B),
                img_shapes=(1, rows, columns),
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                timestep=t_B,
                collect=trace,
            )
            traces.append(trace)
    finally:
        for hook in hooks:
            hook.remove()
    routings = {}
    for layer, inputs in seen.items():
        routings[layer] = LayerRouting(
            torch.stack([trace.layers[layer].weights_BSE() for trace in traces]),
            torch.stack([trace.layers[layer].taken_BSE() for trace in traces]),
            torch.cat(inputs),
        )
    return routings


def describe_layer(model: NucleusTransformer, layer: int, routing: LayerRouting) -> dict[str, Any]:
    """The metrics of one layer, as in routing.json. See the module's docstring."""
    weights, taken = routing.weights_TBSE, routing.taken_TBSE
    same_set, same_gates = jaccard(taken[:-1], taken[1:]), gate_cosine(weights[:-1], weights[1:])
    experts_TN = taken.sum(-1).flatten(1).float()
    probability = taken.float().mean().item()
    mlp = model.transformer_blocks[layer].img_mlp
    return {
        "jaccard": same_set.mean().item(),
        "jaccard_by_chance": probability / (2 - probability),
        "cosine": same_gates.mean().item(),
        "jaccard_between_timesteps": same_set.mean((1, 2)).tolist(),
        "cosine_between_timesteps": same_gates.mean((1, 2)).tolist(),
        "distinct": taken.any(0).sum(-1).float().mean().item(),
        "experts_mean": experts_TN.mean(1).tolist(),
        "experts_std": experts_TN.std(1).tolist(),
        "experts_max": experts_TN.amax(1).int().tolist(),
        "dropped": (experts_TN == 0).float().mean(1).tolist(),
        "router_row_cosine": mean_pair_cosine(mlp.gate.weight.detach(), absolute=True).item(),
        "expert_output_cosine": expert_output_cosine(mlp.experts, routing.inputs_ND),
    }


def token_maps(routing: LayerRouting, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """experts [B, T, rows, columns] (bytes), jaccard (mean over timesteps) and distinct [B, rows, columns]; on the CPU."""
    taken = routing.taken_TBSE.cpu()
    return {
        "experts": taken.sum(-1).transpose(0, 1).unflatten(-1, (rows, columns)).to(torch.uint8),
        "jaccard": jaccard(taken[:-1], taken[1:]).mean(0).unflatten(-1, (rows, columns)),
        "distinct": taken.any(0).sum(-1).unflatten(-1, (rows, columns)).to(torch.uint8),
    }


def find_transformer(path: str | Path, device: str | torch.device = "cpu") -> NucleusTransformer:
    """The model of a transformer directory, of an artifact that contains one, or of a training checkpoint, in eval mode.

    A training checkpoint has only weights (DCP), local or remote. Its configuration is in the manifest of the artifact that
    contains it, or in the run.json of a running stage. For a directory of checkpoints, the last one is loaded.

    Raises:
        ValueError: the path is none of these, or the weights do not match the configuration.
    """
    if not storage.is_remote(path):
        path = Path(path).absolute()
        for directory in (path / "transformer", path):
            if (directory / "config.json").is_file():
                return load_transformer(directory, device=device)
    checkpoint = last_checkpoint(path)
    around = checkpoint.rstrip("/").rsplit("/", 1)[0]
    if sealed := storage.read_bytes(storage.join(around, storage.MANIFEST)):
        config = TransformerConfig(**json.loads(sealed)["config"]["model"])
    elif running := storage.read_bytes(f"{around.rpartition('/')[0]}/run.json"):
        run = json.loads(running)
        config = TransformerConfig(**run["transformer"]).with_capacity_factors(run["stage"]["capacity_factors"])
    else:
        raise ValueError(
            f"{checkpoint} is neither in a checkpoints artifact (no {around}/manifest.json) nor in a running stage "
            "(no run.json above weights/)"
        )
    return assembled(config, open_weights(checkpoint), device=device)


def analyse(model: NucleusTransformer, latents: Path, out: Path, images: int, timesteps: int, seed: int) -> dict:
    """Writes all files into `out` and returns the content of routing.json. See the module's docstring."""
    if images < 1 or timesteps < 2:
        raise ValueError(f"images={images} must be at least 1 and timesteps={timesteps} at least 2")
    dataset = LatentDataset(latents)
    if dataset.meta.text_form != "states":
        raise ValueError(f"the texts of {latents} are stored as tokens (encoding.text: online), not as states")
    bucket = int(dataset.counts.sum(1).argmax())
    bucket_rows = np.arange(*dataset.bucket_begin[bucket : bucket + 2])
    chosen = bucket_rows[np.linspace(0, len(bucket_rows) - 1, min(images, len(bucket_rows))).round().astype(int)]
    weight = model.proj_out.weight
    clean = dataset.latents(chosen).to(weight)  # in the model's type and on its device
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    text, mask = dataset.text([dataset.captions(row)[0] for row in chosen])
    levels = torch.linspace(0.95, 0.05, timesteps).tolist()
    mask = None if mask is None else mask.to(weight.device)
    layers = watch_routing(model, clean, noise, text.to(weight), mask, levels)

    described = {layer: describe_layer(model, layer, routing) for layer, routing in sorted(layers.items())}
    grid = dataset.bucket_tokens(dataset.bucket_names[bucket])
    maps = {layer: token_maps(routing, *grid) for layer, routing in sorted(layers.items())}
    single = [key for key, value in next(iter(described.values())).items() if isinstance(value, float)]
    report = {
        "images": dataset.record_ids(chosen),
        "bucket": dataset.bucket_names[bucket],
        "timesteps": [round(level, 4) for level in levels],
        "seed": seed,
        "mean": {key: sum(layer[key] for layer in described.values()) / len(described) for key in single},
        "layers": {f"{layer:02d}": numbers for layer, numbers in described.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "routing.json").write_text(json.dumps(report, indent=1) + "\n")
    tensors = {f"layer{i:02d}/{key}": value.contiguous() for i, layer in maps.items() for key, value in layer.items()}
    save_file(tensors, out / "maps.safetensors")
    for i, latent in enumerate(clean.float().cpu()):
        image_maps = {
            layer: {key: values[i] for key, values in layer_maps.items()} for layer, layer_maps in maps.items()
        }
        draw_image(out / f"image{i}.png", latent, image_maps, levels)
    draw_stability(out / "stability.png", described, levels)
    return report


def latent_picture(latent: torch.Tensor) -> torch.Tensor:
    """A latent [C, h, w] as RGB [h, w, 3] in [0, 1]: its three principal components over the channels."""
    pixels = latent.flatten(1).T
    pixels = pixels - pixels.mean(0)
    directions = torch.linalg.eigh(pixels.T @ pixels).eigenvectors[:, -3:]
    picture = pixels @ directions
    low, high = picture.amin(0), picture.amax(0)
    return ((picture - low) / (high - low).clamp_min(1e-6)).view(*latent.shape[1:], -1)


def draw_image(path: Path, latent: torch.Tensor, maps: dict[int, dict[str, torch.Tensor]], levels: list[float]) -> None:
    """Draws one row per layer: experts per token at each timestep, mean jaccard, and distinct experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + len(levels) + 2
    figure = Figure(figsize=(1.35 * columns, 1.45 * len(maps) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(maps), columns, squeeze=False)
    most, variety = (max(int(layer[key].max()) for layer in maps.values()) for key in ("experts", "distinct"))
    shown = {}
    for row, (layer, layer_maps) in zip(axes, maps.items()):
        row[0].imshow(latent_picture(latent))
        row[0].set_ylabel(f"layer {layer}", fontsize=8)
        for axis, experts in zip(row[1:], layer_maps["experts"]):
            shown["experts"] = axis.imshow(experts, vmin=0, vmax=most, cmap="viridis")
        shown["jaccard"] = row[-2].imshow(layer_maps["jaccard"], vmin=0, vmax=1, cmap="magma")
        shown["distinct"] = row[-1].imshow(layer_maps["distinct"], vmin=0, vmax=variety, cmap="cividis")
    titles = ["latent", *(f"t = {level:.2f}" for level in levels), "jaccard", "distinct"]
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for key, part in (("experts", axes[:, 1:-2]), ("jaccard", axes[:, -2]), ("distinct", axes[:, -1])):
        whole = [] if key == "jaccard" else range(int(shown[key].norm.vmax) + 1)
        figure.colorbar(shown[key], ax=part, location="bottom", shrink=0.6, ticks=whole or None)
    axes[-1, len(levels) // 2].set_xlabel("experts that took the token", fontsize=8)
    figure.savefig(path, dpi=100)


def draw_stability(path: Path, layers: dict[int, dict[str, Any]], levels: list[float]) -> None:
    """Plots jaccard and cosine between neighbouring timesteps, one line per layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    between = [(one + other) / 2 for one, other in zip(levels, levels[1:])]
    for axis, measure in zip(figure.subplots(1, 2), ("jaccard", "cosine")):
        for i, (layer, numbers) in enumerate(layers.items()):
            color = f"C{i % 10}"
            axis.plot(between, numbers[f"{measure}_between_timesteps"], marker="o", color=color, label=f"layer {layer}")
            if measure == "jaccard":
                axis.axhline(numbers["jaccard_by_chance"], color=color, linewidth=0.8, linestyle=":")
        axis.set(title=f"{measure} of neighbouring timesteps", xlabel="t (1 is noise)", ylim=(0, 1.02))
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=1 + len(layers) // 10)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 with one line on stderr if an argument or a file is wrong."""
    parser = argparse.ArgumentParser(prog="python -m model.routing_report", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--latents",
        required=True,
        type=Path,
        help="an index of latents at the checkpoint's resolution (HOME/indexes/KEY)",
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--timesteps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--device", type=torch.device, default=accelerator or "cpu", help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        model = find_transformer(args.checkpoint, args.device)
        report = analyse(model, args.latents, args.out, args.images, args.timesteps, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, numbers in (*report["layers"].items(), ("mean", report["mean"])):
        print(
            f"layer {name}: jaccard {numbers['jaccard']:.3f} (by chance {numbers['jaccard_by_chance']:.3f}), cosine "
            f"{numbers['cosine']:.3f}, distinct experts {numbers['distinct']:.2f}, router rows "
            f"{numbers['router_row_cosine']:.3f}, expert outputs {numbers['expert_output_cosine']:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
