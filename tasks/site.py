"""The site's configuration: a Flyte configuration with a section `nucleus` (config/flyte.example.yaml)."""

from __future__ import annotations

from pathlib import Path

import yaml

# key of the section `nucleus` -> environment variable of tasks/profiles.py
SETTINGS = {
    "profile": "NUCLEUS_PROFILE",
    "accelerator_label": "NUCLEUS_ACCELERATOR_LABEL",
    "fabric": "NUCLEUS_FABRIC",
    "queue": "NUCLEUS_QUEUE",
    "topology": "NUCLEUS_TOPOLOGY",
    "metrics_port": "NUCLEUS_METRICS_PORT",
    "pod_templates": "NUCLEUS_POD_TEMPLATES",
    "hub_secret": "NUCLEUS_HUB_SECRET",
    "wandb_secret": "NUCLEUS_WANDB_SECRET",
    "endpoints": "NUCLEUS_ENDPOINTS",  # of captioners, separated by commas
    "captioner_secret": "NUCLEUS_CAPTIONER_SECRET",
    "notify": "NUCLEUS_NOTIFY",
    "store": "NUCLEUS_STORE",  # otherwise pods cannot see each other's parts
    "console": "NUCLEUS_CONSOLE",
}
REQUIRED = ("project", "domain", "store")
FREE = ("bucket",)


def load_site(path: Path) -> dict:
    """The Flyte configuration with its section `nucleus`.

    Raises:
        ValueError: no such file, no endpoint, or an unknown or missing key of the section.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: copy config/flyte.example.yaml to it and name your endpoint")
    config = yaml.safe_load(path.read_text()) or {}
    section = config.get("nucleus", {})
    if not config.get("admin", {}).get("endpoint"):
        raise ValueError(f"{path} has no admin.endpoint")
    if missing := [key for key in REQUIRED if not section.get(key)]:
        raise ValueError(f"{path}: nucleus.{missing[0]} is missing")
    if unknown := sorted(section.keys() - {*REQUIRED, *FREE, *SETTINGS}):
        raise ValueError(
            f"{path}: nucleus.{unknown[0]} is unknown; use {', '.join(dict.fromkeys([*REQUIRED, *SETTINGS, *FREE]))}"
        )
    return config
