"""python -m tasks.preflight: exits 0 if no check fails."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from tasks import preflight, profiles
from tasks.preflight import checks, cluster, namespace, nodes, queues, services  # noqa: F401  (they register their checks)
from tasks.recipe import load_recipe
from tasks.site import SETTINGS, load_site


def target(arguments: argparse.Namespace) -> checks.Target:
    """The run and the site from the arguments and the configuration. Exports the site's settings to this process's
    environment, as a registration does.

    Raises:
        ValueError: an unreadable configuration, an unknown recipe, profile or fabric.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.shape)
    if not match:
        raise ValueError(f"--shape {arguments.shape!r} is not a shape; use NODESxPROCESSES, such as 8x8")
    site = load_site(arguments.config)
    section, admin = site["nucleus"], site["admin"]
    os.environ.update({name: str(section[key]) for key, name in SETTINGS.items() if section.get(key)})
    images = {}
    if arguments.lock.is_file():
        locked = json.loads(arguments.lock.read_text())["images"]
        images = {role: f"{entry['image']}@{entry['digest']}" for role, entry in locked.items()}
    return checks.Target(
        recipe=load_recipe(arguments.recipe, arguments.overrides),
        nnodes=int(match[1]),
        nproc=int(match[2]),
        profile=profiles.chosen(),
        namespace=f"{section['project']}-{section['domain']}",
        fabric=profiles.fabric(),
        queue=section.get("queue", ""),
        accelerator=section.get("accelerator_label", ""),
        hub_secret=section.get("hub_secret", ""),
        wandb_secret=section.get("wandb_secret", ""),
        pod_templates=section.get("pod_templates") not in ("off", False),
        bucket=section.get("bucket", ""),
        store=section["store"],
        endpoint=admin["endpoint"],
        insecure=bool(admin.get("insecure")),
        project=section["project"],
        domain=section["domain"],
        images=images,
        api=_api(),
    )


def _api():
    from kubernetes import client, config

    try:
        config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
    except config.ConfigException:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            raise ValueError("there is neither a kubeconfig (KUBECONFIG) nor a pod's service account") from None
    configuration = client.Configuration.get_default_copy()
    configuration.retries = 1
    return client.ApiClient(configuration)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.preflight",
        description=preflight.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--overrides", action="append", default=[])
    parser.add_argument("--shape", default="1x1", help="NODESxPROCESSES")
    parser.add_argument("--config", type=Path, default=Path("config/flyte.yaml"))
    parser.add_argument("--lock", type=Path, default=Path("containers/images.lock.json"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    try:
        results = checks.run_checks(target(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(checks.as_json(results) if arguments.json else checks.table(results))
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
