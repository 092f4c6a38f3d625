"""The directory that `DiffusionPipeline.from_pretrained(DIR)` loads as NucleusMoEImagePipeline.

    merged/transformer ----------------+
    components/vae, text_encoder,      +--> DIR/{model_index.json, transformer/, vae/, text_encoder/, processor/,
               processor --------------+         scheduler/, README.md, scorecard.json, grid.png, SHA256SUMS}
    scorecard/scorecard.json, grid.png +
    further scorecards ----------------+         scorecard-BENCHMARK.json

Weights are copied byte by byte, so that the scored weights are the published ones; no model is loaded.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.files import file_sha256
from model.constants import PIPELINE_TEXT_STATE
from model.logs import get_logger
from tasks.diffusers_parts import SCHEDULER, processor_class
from tasks.manifest import MANIFEST, load_manifest
from tasks.publishing import redact
from tasks.publishing.card import model_card
from tasks.publishing.config import PublishConfig
from tasks.trace import lineage_rows

logger = get_logger(__name__)

SUMS = "SHA256SUMS"
# The check of a pipeline with more parameters loads it in bfloat16: at 17B, float32 would take 103 GB.
LARGE_PARAMETERS = 4_000_000_000
LARGE_SIDE_PX = 256
TIMEOUT_S, LARGE_TIMEOUT_S = 1800.0, 3 * 3600.0
# The source of each part, the class that diffusers loads for it, and the files that it needs.
PARTS = {
    "transformer": ("diffusers", "NucleusMoEImageTransformer2DModel", ("config.json", "*.safetensors")),
    "vae": ("diffusers", "AutoencoderKLQwenImage", ("config.json", "*.safetensors")),
    "text_encoder": ("transformers", "Qwen3VLForConditionalGeneration", ("config.json", "*.safetensors")),
    "processor": ("transformers", "", ("tokenizer_config.json",)),
}


def publish(
    merged_dir: str | Path,
    components_dir: str | Path,
    scorecard_dir: str | Path,
    recipe: dict[str, Any],
    out_dir: str | Path,
    further_dirs: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Assembles the pipeline directory.

    Args:
        merged_dir: has `transformer/` in diffusers' layout.
        components_dir: has `vae/`, `text_encoder/` and `processor/`.
        scorecard_dir: has `scorecard.json`, and optionally `grid.png`: nothing is published without scores.
        recipe: the whole recipe by `redact.recipe`, which the card describes.
        out_dir: an empty directory.
        further_dirs: scorecards of further benchmarks.

    Returns:
        {"files", "bytes", "image_size_px", "class"}.

    Raises:
        ValueError: a part is missing, or the parts do not fit together.
    """
    out_dir = Path(out_dir)
    sources = {"transformer": Path(merged_dir) / "transformer"}
    sources |= {name: Path(components_dir) / name for name in ("vae", "text_encoder", "processor")}
    for name, source in sources.items():
        for pattern in PARTS[name][2]:
            if not any(source.glob(pattern)):
                raise ValueError(f"{source} has no {pattern}: it is not a {name} that diffusers can load")
    _check_fit(sources, recipe)
    scorecard, *further = (_read_scorecard(Path(directory)) for directory in (scorecard_dir, *further_dirs))
    _check_scores([scorecard, *further], Path(merged_dir), Path(components_dir), recipe)

    for i, (name, source) in enumerate(sources.items(), 1):
        logger.info(f"publish {i}/{len(sources)}: {name}")
        shutil.copytree(source, out_dir / name, copy_function=shutil.copyfile)
    diffusers = version("diffusers")
    scheduler = {"_diffusers_version": diffusers, **SCHEDULER, **recipe["eval"]["scheduler"]}
    _write_json(out_dir / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {"_class_name": "NucleusMoEImagePipeline", "_diffusers_version": diffusers}
    for name, (library, class_name, _) in sorted(PARTS.items()):
        index[name] = [library, class_name or processor_class(sources["processor"])]
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    _write_json(out_dir / "model_index.json", index)

    _copy_scorecard(Path(scorecard_dir), scorecard, out_dir / "scorecard.json")
    for directory, card in zip(further_dirs, further, strict=True):
        name = re.sub(r"[^\w.-]", "-", card["benchmark"])
        _copy_scorecard(Path(directory), card, out_dir / f"scorecard-{name}.json")
    if (Path(scorecard_dir) / "grid.png").is_file():
        shutil.copyfile(Path(scorecard_dir) / "grid.png", out_dir / "grid.png")

    parents = [merged_dir, components_dir, scorecard_dir, *further_dirs]
    has_grid = (out_dir / "grid.png").is_file()
    (out_dir / "README.md").write_text(model_card(recipe, scorecard, lineage_rows(parents), has_grid, further))
    files = _write_sums(out_dir)
    return {
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "image_size_px": recipe["eval"]["image_size_px"],
        "class": index["_class_name"],
    }


def _read_scorecard(directory: Path) -> dict[str, Any]:
    path = directory / "scorecard.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no scorecard.json; only a model with scores is published")
    return json.loads(path.read_text())


def _copy_scorecard(directory: Path, card: dict[str, Any], target: Path) -> None:
    """Copies it byte for byte, or without the places that its settings name."""
    public = redact.scorecard(card)
    if public == card:
        shutil.copyfile(directory / "scorecard.json", target)
    else:
        target.write_text(json.dumps(public, indent=1, allow_nan=False) + "\n")


def _check_scores(cards: Sequence[dict[str, Any]], merged: Path, components: Path, recipe: dict[str, Any]) -> None:
    """Refuses scores of other weights, two of one benchmark, and the lack of one that the recipe asks for."""
    digests = {"merged": load_manifest(merged).digest, "components": load_manifest(components).digest}
    for card in cards:
        scored = card["settings"]["model_digests"]
        for kind, digest in digests.items():
            if scored.get(kind, digest) != digest:
                raise ValueError(
                    f"the scorecard of {card['name']} is of other {kind} (digest {scored[kind][:12]}) than those to publish "
                    f"({digest[:12]}): score these"
                )
    names = [card["benchmark"] for card in cards]
    if len(set(names)) < len(names):
        raise ValueError(f"there are two scorecards of one benchmark among {', '.join(names)}: give one of each")
    if absent := [name for name in recipe["eval"].get("further_benchmarks", ()) if name not in names]:
        raise ValueError(
            f"the recipe's eval.further_benchmarks have {', '.join(absent)}, of which no scorecard is given: add it to "
            "further, or change the recipe"
        )


def _check_fit(sources: dict[str, Path], recipe: dict[str, Any]) -> None:
    """Refuses parts of different recipes before gigabytes are copied."""
    transformer, vae, text = (
        json.loads((sources[name] / "config.json").read_text()) for name in ("transformer", "vae", "text_encoder")
    )
    text = text.get("text_config", text)
    class_name = PARTS["transformer"][1]
    if transformer.get("_class_name") != class_name:
        raise ValueError(
            f"the transformer is of class {transformer.get('_class_name')}: only {class_name} can be published, as "
            "diffusers knows no other; an ablation ends in its scorecard (workflows/ablate.py)"
        )
    if transformer["joint_attention_dim"] != text["hidden_size"]:
        raise ValueError(
            f"the transformer takes text of width {transformer['joint_attention_dim']}, "
            f"the text encoder gives {text['hidden_size']}"
        )
    packed = vae["z_dim"] * transformer["patch_size"] ** 2
    if transformer["in_channels"] != packed:
        raise ValueError(f"the transformer takes {transformer['in_channels']} channels, the VAE gives {packed} packed")
    index = recipe["encoding"]["hidden_state_index"]
    for name, value in (("the pipeline's default", PIPELINE_TEXT_STATE), ("the recipe's", index)):
        if abs(value) >= text["num_hidden_layers"]:
            raise ValueError(
                f"{name} return_index {value} needs more than {abs(value)} text layers; "
                f"the text encoder has {text['num_hidden_layers']}"
            )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_sums(directory: Path) -> list[Path]:
    """Writes SHA256SUMS over every other file, for `sha256sum -c SHA256SUMS`. Returns all files."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (SUMS, MANIFEST))
    lines = [f"{file_sha256(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    (directory / SUMS).write_text("".join(lines))
    return [*files, directory / SUMS]


# Cannot import this project by accident: -I, another working directory, and a check at the end.
_CHECK = """
import json, sys, time
start = time.time()
import torch
from diffusers import DiffusionPipeline, TextKVCacheConfig
directory, height, width, dtype, project = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else getattr(torch, dtype)
pipe = DiffusionPipeline.from_pretrained(directory, torch_dtype=dtype, local_files_only=True).to(device)
pipe.set_progress_bar_config(disable=True)
def draw():
    noise = torch.manual_seed(0)  # the global state: a stochastic scheduler draws from it, whatever the pipeline is given
    return pipe("a photo of a red circle", height=height, width=width, num_inference_steps=2, generator=noise, output_type="np").images[0]
plain = draw()
pipe.transformer.enable_cache(TextKVCacheConfig())
cached = draw()
assert plain.shape == (height, width, 3), plain.shape
assert (plain == plain).all(), "the image has NaN"
loaded = sorted({name.split(".")[0] for name in sys.modules} & set(project))
assert not loaded, f"loading imported {loaded}"
print("CHECK " + json.dumps({"ok": True, "class": type(pipe).__name__, "device": device, "dtype": str(dtype).rpartition(".")[2], "image_size_px": [height, width],
    "cache_max_difference": float(abs(plain - cached).max()), "seconds": round(time.time() - start, 1)}))
"""


def _without_secrets(home: str) -> dict[str, str]:
    """The environment of a process that loads untrusted files: no tokens, credentials or home of the user."""
    kept = (
        "PATH",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "VIRTUAL_ENV",
    )
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}


def count_parameters(directory: str | Path) -> int:
    """Elements of all tensors in the safetensors files below a directory, by their headers."""
    total = 0
    for path in Path(directory).rglob("*.safetensors"):
        with open(path, "rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except ValueError:
                continue  # loading reports the damaged file
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def check_dtype(parameters: int) -> str:
    """The type in which `check_pipeline` loads a pipeline on a CPU."""
    return "bfloat16" if parameters > LARGE_PARAMETERS else "float32"


def check_memory_bytes(parameters: int) -> int:
    """Bytes of the weights that `check_pipeline` loads on a CPU."""
    return parameters * (2 if check_dtype(parameters) == "bfloat16" else 4)


def check_pipeline(
    directory: str | Path, height_px: int = 64, width_px: int = 64, timeout_s: float | None = None
) -> dict[str, Any]:
    """Loads the directory in a fresh process with only diffusers, transformers and torch, and draws one image in two
    steps, without and with TextKVCacheConfig. A large pipeline is loaded in bfloat16, and draws at most 256 px.

    Args:
        timeout_s: default: 30 minutes, or 3 hours for a large pipeline.

    Returns:
        {"ok": True, "class", "device", "dtype", "image_size_px", "cache_max_difference", "seconds"}; the difference is of
        pixels in [0, 1] and is 0 in float32.

    Raises:
        ValueError: it did not load or draw; the message has the last lines of the process's output.
    """
    parameters = count_parameters(directory)
    large = parameters > LARGE_PARAMETERS
    if large:
        height_px, width_px = min(height_px, LARGE_SIDE_PX), min(width_px, LARGE_SIDE_PX)
    timeout_s = timeout_s or (LARGE_TIMEOUT_S if large else TIMEOUT_S)
    command = [sys.executable, "-I", "-c", _CHECK, str(Path(directory).resolve())]
    command += [str(height_px), str(width_px), check_dtype(parameters)]
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            done = subprocess.run(
                [*command, "workflows", "tasks", "model", "eval", "flytekit", "torchtitan"],
                cwd=elsewhere,
                stdin=subprocess.DEVNULL,
                env=_without_secrets(elsewhere),
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{directory} did not draw an image within {timeout_s:.0f} s") from None
    reported = [line for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    if done.returncode or not reported:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ValueError(f"{directory} does not load and draw in a fresh process (exit {done.returncode}):\n{last}")
    report = json.loads(reported[-1].removeprefix("CHECK "))
    # bfloat16 may batch matrix products differently; in float32 the cache is the same computation.
    limit = 0.0 if report["dtype"] == "float32" else 0.05
    if report["cache_max_difference"] > limit:
        raise ValueError(
            f"{directory}: with TextKVCacheConfig the image differs by {report['cache_max_difference']} (limit {limit})"
        )
    return report


def upload(directory: str | Path, config: PublishConfig) -> dict[str, Any]:
    """Uploads a sealed pipeline directory as the recipe says: to the Hub, to S3, to both, or not at all.

    Returns:
        {"hub": report?, "s3": report?}, see hub.push and s3.upload.

    Raises:
        ValueError: the directory does not verify, or the destination refuses it.
    """
    from tasks.publishing import hub, s3

    done: dict[str, Any] = {}
    if config.s3_uri is not None:
        done["s3"] = s3.upload(directory, config.s3_uri, bucket_owner=config.s3_bucket_owner)
    if config.hub_repo_id is not None:
        done["hub"] = hub.push(directory, config.hub_repo_id, private=config.hub_private, revision=config.hub_revision)
    return done
