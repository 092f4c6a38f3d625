"""Frozen components, and each stage's latents and text embeddings."""

from __future__ import annotations

import shutil
from typing import Optional

from flytekit import task

from tasks import envs
from tasks.artifacts import ComponentsDir, CuratedDir, LatentsDir, exclusive, fetch, produce, work_path
from tasks.encoding.config import ComponentsConfig, EncodeStage, EncodingConfig


@task(cache=envs.cache("components"), **envs.gpu_single("encoder"))
def make_components(curated: CuratedDir, config: ComponentsConfig) -> ComponentsDir:
    """VAE, text encoder and processor: pinned from the Hub, or small ones trained on the curated corpus."""
    from tasks.encoding import components

    path = fetch(curated, "curated")
    work_dir = work_path("components", "components", config.model_dump(mode="json"), [path])
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "components",
            lambda out: components.make_components(path, config, out, work_dir),
            parents=[path],
            config=config,
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("encoding"), **envs.gpu_single("encoder"))
def encode_stage(
    curated: CuratedDir,
    components: ComponentsDir,
    stage: EncodeStage,
    config: EncodingConfig,
    text_from: Optional[LatentsDir] = None,
) -> LatentsDir:
    """Latents and text embeddings of one stage. Stages share their texts: later ones take them from the first."""
    from tasks.encoding import encode

    curated_path, components_path = fetch(curated, "curated"), fetch(components, "components")
    text_path = fetch(text_from, "latents") if text_from is not None else None
    artifact, _, _ = produce(
        "latents",
        lambda out: encode.encode_stage(curated_path, components_path, stage, config, out, text_from=text_path),
        parents=[curated_path, components_path],
        config={"stage": stage.model_dump(mode="json"), "encoding": config.model_dump(mode="json")},
        counts=lambda report: {"images": int(report["images"])},
    )
    return artifact
