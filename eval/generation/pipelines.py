"""Any diffusers pipeline as a sampler: loaded from a directory or the Hub, deterministic unless asked otherwise.

    "./pipeline", "/data/pipeline"            a directory that diffusers loads
    "OWNER/NAME" with a 40-digit revision     the Hub, at that commit

Only safetensors are read, and no code of the repository runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from eval.config import EvalConfig
from eval.files import file_sha256
from eval.generation.generate import Sampler
from eval.judging.protocols import digest_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def load_pipeline(
    model: str, *, revision: str | None = None, dtype: str | None = None, device: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Loads a pipeline of any class onto a device.

    Args:
        model: a directory (starting with ./, ../ or /), or a Hub id.
        revision: the commit of a Hub id; a branch could move between two runs.
        dtype: such as "bfloat16"; None: bfloat16 on a GPU, float32 on a CPU.
        device: None: a GPU where there is one.

    Returns:
        (pipeline, {"model", "digest"}): a Hub id's digest is its commit, a directory's that of its files.

    Raises:
        ValueError: no such directory or id, no pinned commit, or diffusers cannot load it.
    """
    import torch
    from diffusers import DiffusionPipeline

    check_model(model, revision)
    local = is_local(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is none of torch, such as float32 or bfloat16")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            model,
            revision=revision,
            torch_dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=local,
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        where = "" if local else f" at {revision}"
        raise ValueError(f"diffusers cannot load {model}{where}: {error}") from error
    digest = directory_digest(Path(model)) if local else revision
    return pipeline.to(device), {"model": Path(model).name if local else model, "digest": digest}


def is_local(model: str) -> bool:
    """Whether `model` is a path: it must begin with ./, ../ or /, so that a folder OWNER/NAME cannot replace a Hub
    id."""
    return model.startswith(("./", "../", "/")) or model in (".", "..")


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form OWNER/NAME. A folder of that form is written as ./OWNER/NAME."""
    return _HUB_ID.fullmatch(model) is not None


def directory_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of all files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return digest_of({path.relative_to(directory).as_posix(): file_sha256(path) for path in files})


def resolve(model: str, revision: str | None = None) -> str:
    """The digest of `model`'s weights: of a directory's files, or the commit of a Hub id.

    Raises:
        ValueError: see `load_pipeline`.
    """
    check_model(model, revision)
    return directory_digest(Path(model)) if is_local(model) else str(revision)


def check_model(model: str, revision: str | None) -> None:
    """
    Raises:
        ValueError: no such directory or id, no pinned commit, or a commit of a directory.
    """
    if is_local(model):
        if not (Path(model) / "model_index.json").is_file():
            raise ValueError(f"{model} is not a pipeline directory: it has no model_index.json")
        if revision is not None:
            raise ValueError(f"{model} is a directory, which has no revision ({revision})")
    elif not is_hub_id(model):
        raise ValueError(f"model {model!r} is neither a directory (./NAME or /PATH) nor a Hub id (OWNER/NAME)")
    elif not _COMMIT.fullmatch(revision or ""):
        raise ValueError(f"{model} needs its revision, a commit of 40 hexadecimal digits, and not {revision!r}")


def diffusers_sampler(pipeline: Any, config: EvalConfig, text_kv_cache: bool | None = None) -> Sampler:
    """A sampler over a diffusers text-to-image pipeline of any class.

    Noise is drawn on the CPU, so that it is the same on every device. Settings that the class does not support are left
    out, and recorded as such; the scheduler adds noise at its steps only if `config.scheduler` says so, and then each
    image draws from its own generator.

    Args:
        pipeline: loaded, on its device.
        config: steps, guidance, negative prompt.
        text_kv_cache: compute the text's keys and values once per call and not at each step (lossless); None: if the
            transformer can.

    Raises:
        ValueError: a negative prompt is set, but the class takes none.
    """
    import diffusers
    import torch

    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    cacheable = hasattr(denoiser, "enable_cache") and type(pipeline).__name__ == "NucleusMoEImagePipeline"
    text_kv_cache = cacheable if text_kv_cache is None else text_kv_cache
    if cacheable and text_kv_cache and not denoiser.is_cache_enabled:
        denoiser.enable_cache(diffusers.TextKVCacheConfig())
    elif cacheable and not text_kv_cache and denoiser.is_cache_enabled:
        denoiser.disable_cache()
    pipeline.set_progress_bar_config(disable=True)
    _set_stochastic(pipeline, config.scheduler.stochastic_sampling)

    options = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    if config.negative_prompt is not None:
        options["negative_prompt"] = config.negative_prompt
    taken = inspect.signature(pipeline.__call__).parameters
    left_out = sorted(set(options) - set(taken))
    if "negative_prompt" in left_out:
        raise ValueError(f"{type(pipeline).__name__} takes no negative prompt, and {config.negative_prompt!r} is set")
    options = {name: value for name, value in options.items() if name in taken}

    def sample(prompts: list[str], seeds: list[int], height: int, width: int) -> list[Image.Image]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = dict(options)
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        with _noise_of_steps(pipeline.scheduler, generators):
            return pipeline(
                prompt=list(prompts), generator=generators, height=height, width=width, output_type="pil", **call
            ).images

    sample.settings = {
        "pipeline": type(pipeline).__name__,
        "denoiser": type(denoiser).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": _public(pipeline.scheduler.config),
        "options": options,
        "options_not_taken": left_out,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "attention": _attention(denoiser),
        "device": str(denoiser.device.type),
        "device_name": torch.cuda.get_device_name(denoiser.device) if denoiser.device.type == "cuda" else "cpu",
        "negative_prompt": config.negative_prompt or "",
        "text_kv_cache": text_kv_cache,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }
    return sample


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in json.loads(json.dumps(dict(config), default=str)).items() if not k.startswith("_")}


def _attention(denoiser: Any) -> str:
    """Classes of the attention processors, as diffusers lists them; "unknown" for other models."""
    processors = getattr(denoiser, "attn_processors", None) or {}
    return ", ".join(sorted({type(p).__name__ for p in processors.values()})) or "unknown"


def _set_stochastic(pipeline: Any, wanted: bool) -> None:
    """Sets stochastic sampling as configured, if the scheduler supports both, whatever its published setting."""
    scheduler = pipeline.scheduler
    published = scheduler.config.get("stochastic_sampling")
    if published is None:
        if wanted:
            raise ValueError(f"{type(scheduler).__name__} has no stochastic_sampling, which the configuration asks for")
    elif published != wanted:
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, stochastic_sampling=wanted)


@contextlib.contextmanager
def _noise_of_steps(scheduler: Any, generators: list[Any]) -> Iterator[None]:
    """Lets a stochastic scheduler draw from these generators, one for each image: the pipeline uses them for the first
    noise but does not pass them to the scheduler, which would draw from the global state."""
    if not scheduler.config.get("stochastic_sampling"):
        yield
        return
    scheduler.step = functools.partial(scheduler.step, generator=generators)
    try:
        yield
    finally:
        del scheduler.step
