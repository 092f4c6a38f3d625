"""Copies pinned components from the Hugging Face Hub (named files of one commit) or from a local directory.

The reasons are in docs/decisions/encoding.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from model.logs import get_logger
from tasks.encoding.config import ComponentsConfig, HubComponent

logger = get_logger(__name__)

# Only these files are downloaded, in particular no code. A ? stands for one digit of a file's number.
VAE_FILES = (
    "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-?????-of-?????.safetensors",
)  # fmt: skip
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
)  # fmt: skip
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
CLASSES = (
    ("vae", "_class_name", "AutoencoderKLQwenImage"),
    ("text_encoder", "architectures", ["Qwen3VLForConditionalGeneration"]),
)


def copy_components(config: ComponentsConfig, out_dir: Path) -> dict[str, Any]:
    """Fills vae/, text_encoder/ and processor/ of `out_dir`. Returns the origin of each component.

    Raises:
        ValueError: a component is not available, or has another class.
    """
    sources = {"vae": config.hub_vae, "text_encoder": config.hub_text_encoder}
    for name, files, source in (
        ("vae", VAE_FILES, "vae"),
        ("text_encoder", MODEL_FILES, "text_encoder"),
        ("processor", PROCESSOR_FILES, "text_encoder"),
    ):
        component = sources[source]
        assert component is not None
        fetch(component, files, out_dir / name)
    for name, key, expected in CLASSES:
        value = json.loads((out_dir / name / "config.json").read_text()).get(key)
        if value != expected:
            raise ValueError(f"components.hub_{name}: its config.json has {key}={value!r}, {expected!r} is needed")
    return {name: _origin(source) for name, source in sources.items() if source is not None}


def fetch(component: HubComponent, files: tuple[str, ...], target: Path) -> None:
    """Copies the named files of a pinned component into `target`.

    Raises:
        ValueError: no such repository or revision, the Hub cannot be reached, or none of the files exists.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = f"{component.subfolder}/" if component.subfolder else ""
    if component.is_local:
        source = Path(component.repo_id)
        if not source.is_dir():
            raise ValueError(f"{component.repo_id} is not a directory")
    else:
        logger.info(f"downloading {component.repo_id}@{component.revision[:12]} {inside}")
        try:
            source = Path(
                snapshot_download(
                    component.repo_id,
                    revision=component.revision,
                    allow_patterns=[inside + name for name in files],
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{component.repo_id} at {component.revision} is not available: {error}") from error
    target.mkdir(parents=True, exist_ok=True)
    present = sorted({path for name in files for path in (source / inside).glob(name) if path.is_file()})
    if not present:
        raise ValueError(f"{component.repo_id} at {component.revision} has no {inside}{files[0]}")
    for path in present:
        shutil.copyfile(path, target / path.name)  # copies the content, as the Hub's cache contains links


def _origin(component: HubComponent) -> dict[str, Any]:
    if component.is_local:  # its files are not those of the commit
        return {"repo_id": "local directory", "revision": None, "subfolder": component.subfolder}
    return {"repo_id": component.repo_id, "revision": component.revision, "subfolder": component.subfolder}
