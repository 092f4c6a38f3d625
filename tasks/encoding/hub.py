"""Pinned components of the Hugging Face Hub: exact files of one commit, or those of a local directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.encoding.config import ComponentsConfig, HubComponent

# Names, so that nothing else of a repository is fetched, its code least of all. A ? is one digit of a file's number.
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
    """Fills vae/, text_encoder/ and processor/ of `out_dir`, and says where from.

    Raises:
        ValueError: a component is not available, or of another class.
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
    for name, key, wanted in CLASSES:
        value = json.loads((out_dir / name / "config.json").read_text()).get(key)
        if value != wanted:
            raise ValueError(f"components.hub_{name}: its config.json has {key}={value!r}, {wanted!r} is needed")
    return {name: _origin(source) for name, source in sources.items() if source is not None}


def fetch(component: HubComponent, files: tuple[str, ...], target: Path) -> None:
    """Puts the named files of a pinned component into `target`.

    Raises:
        ValueError: the Hub has no such repository or revision, cannot be reached, or has none of the files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = f"{component.subfolder}/" if component.subfolder else ""
    if component.is_local:
        source = Path(component.repo_id)
        if not source.is_dir():
            raise ValueError(f"{component.repo_id} is not a directory")
    else:
        print(f"downloading {component.repo_id}@{component.revision[:12]} {inside}", flush=True)
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
        shutil.copyfile(path, target / path.name)  # the content: the Hub's cache holds links


def _origin(component: HubComponent) -> dict[str, Any]:
    if component.is_local:  # the commit is not what was copied
        return {"repo_id": "local directory", "revision": None, "subfolder": component.subfolder}
    return {"repo_id": component.repo_id, "revision": component.revision, "subfolder": component.subfolder}
