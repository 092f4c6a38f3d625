"""Looks up a manifest in a container registry, with the login of `docker login` where the registry asks for one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ACCEPT = (
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)
LOCAL = ("localhost", "127.0.0.1")
TIMEOUT_S = 20


def manifest_status(registry: str, repository: str, digest: str) -> int:
    """HTTP status of a HEAD request for the manifest. Logins that a credential helper keeps (credHelpers, as for Amazon ECR)
    are not read."""
    import requests

    scheme = "http" if registry.split(":")[0] in LOCAL else "https"
    url = f"{scheme}://{registry}/v2/{repository}/manifests/{digest}"
    headers = {"Accept": ACCEPT}
    answer = requests.head(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True)
    if answer.status_code == 401:
        authorization = _authorization(answer.headers.get("WWW-Authenticate", ""), _login(registry), registry)
        if authorization:
            headers["Authorization"] = authorization
            answer = requests.head(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True)
    return answer.status_code


def _login(registry: str) -> str:
    """USER:PASSWORD in base64, from Docker's or podman's configuration; empty if there is none."""
    folder = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    path = Path(os.environ.get("REGISTRY_AUTH_FILE") or Path(folder) / "config.json")
    if not path.is_file():
        return ""
    auths: dict[str, Any] = json.loads(path.read_text()).get("auths", {})
    for name, entry in auths.items():
        if re.sub(r"^https?://|/.*$", "", name) == registry:
            return entry.get("auth", "")
    return ""


def _authorization(challenge: str, login: str, registry: str) -> str:
    """The header for the registry's challenge: the login itself, or a token of the server that the challenge names."""
    import requests

    kind, _, rest = challenge.partition(" ")
    if kind.lower() == "basic":
        return f"Basic {login}" if login else ""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = fields.pop("realm", "")
    if kind.lower() != "bearer" or not realm:
        return ""
    local = registry.split(":")[0] in LOCAL
    if not realm.startswith("https://") and not local:
        return ""  # a login is not sent in clear text
    headers = {"Authorization": f"Basic {login}"} if login else {}
    answer = requests.get(realm, params=fields, headers=headers, timeout=TIMEOUT_S)
    if answer.status_code != 200:
        return ""
    body = answer.json()
    token = body.get("token") or body.get("access_token")
    return f"Bearer {token}" if token else ""
