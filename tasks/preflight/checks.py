"""The registry of checks, their results, and their output."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.profiles import Profile

Status = Literal["ok", "failed", "skipped"]
MARKS = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}


class Failed(Exception):
    """A check failed; the message says why."""


class Skipped(Exception):
    """A check does not apply here; the message says why."""


@dataclass(frozen=True)
class Result:
    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass
class Target:
    """The run and its site."""

    recipe: Any
    nnodes: int
    nproc: int
    profile: Profile
    namespace: str
    fabric: str = ""
    queue: str = ""
    accelerator: str = ""  # the site's own value of the label; empty: the profile's
    hub_secret: str = ""
    wandb_secret: str = ""
    pod_templates: bool = True
    bucket: str = ""
    store: str = ""
    endpoint: str = ""
    insecure: bool = False
    project: str = ""
    domain: str = ""
    images: dict[str, str] = field(default_factory=dict)
    api: Any = None  # kubernetes' ApiClient

    @property
    def gpus(self) -> int:
        return self.nnodes * self.nproc if self.profile.accelerator else 0


@dataclass(frozen=True)
class Check:
    name: str
    remedy: str
    look: Callable[[Target], str]


CHECKS: list[Check] = []


def check(name: str, remedy: str) -> Callable[[Callable[[Target], str]], Callable[[Target], str]]:
    """Registers a function that returns its observation as text, or raises Failed or Skipped. `remedy`: what to do when
    it fails."""

    def register(look: Callable[[Target], str]) -> Callable[[Target], str]:
        assert name not in {known.name for known in CHECKS}, name
        CHECKS.append(Check(name, remedy, look))
        return look

    return register


def run_checks(target: Target) -> list[Result]:
    """Runs every check separately; an error of a check is its result."""
    results = []
    for each in CHECKS:
        try:
            results.append(Result(each.name, "ok", each.look(target)))
        except Skipped as reason:
            results.append(Result(each.name, "skipped", str(reason)))
        except Failed as finding:
            results.append(Result(each.name, "failed", str(finding), each.remedy))
        except Exception as error:  # errors of a client: an unreachable server, a refusal
            results.append(Result(each.name, "failed", brief(error), each.remedy))
    return results


def brief(error: Exception) -> str:
    """One line of an error, without bodies or headers, which may contain tokens."""
    status = getattr(error, "status", None)
    if status == 403:
        return "not allowed: this identity lacks the right to look (k8s/base/rbac.yaml has the role nucleus-preflight)"
    if status is not None:
        return f"{type(error).__name__}: {status} {getattr(error, 'reason', '')}"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def table(results: list[Result]) -> str:
    """One line per check; below each failure its remedy."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        lines.append(f"{result.name:<{width}}  {MARKS[result.status]:<7}  {result.detail}")
        if result.remedy:
            indent = " " * (width + 11)
            lines.append(
                textwrap.fill("-> " + result.remedy, 110, initial_indent=indent, subsequent_indent=indent + "   ")
            )
    failed = sum(result.status == "failed" for result in results)
    skipped = sum(result.status == "skipped" for result in results)
    lines.append(f"{len(results)} checks: {failed} failed, {skipped} skipped")
    return "\n".join(lines)


def as_json(results: list[Result]) -> str:
    return json.dumps([dataclasses.asdict(result) for result in results], indent=2)
