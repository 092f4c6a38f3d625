"""What `pyflyte run` lacks for these workflows: `--overrides` that may be given several times.

pyflyte makes an option of each input of a workflow once it has loaded the workflow's module, and before it reads that
option's values. It has no setting for repeated ones, and would keep the last in silence; so here the function that
makes options is given one that also gathers. A workflow with overrides imports this module.
"""

from __future__ import annotations

import sys
from typing import Any

import rich_click as click

REPEATABLE = "overrides"


def _gathering(option: click.Option) -> click.Option:
    """The option, but repeatable: a JSON list counts as its entries, and one list of all reaches the workflow."""

    def gather(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> Any:
        given = [change for value in values for change in (value if isinstance(value, list) else [value])]
        return option.callback(ctx, param, given)

    return click.Option(
        option.opts,
        type=option.type,
        multiple=True,
        default=option.default,
        show_default=bool(option.default),
        help=option.help,
        callback=gather,
    )


def _install() -> None:
    """Has effect under `pyflyte run` alone, where its module is loaded long before this one."""
    pyflyte_run = sys.modules.get("flytekit.clis.sdk_in_container.run")
    if pyflyte_run is None:
        return
    make_option = pyflyte_run.to_click_option

    def to_click_option(ctx: click.Context, flyte_ctx: Any, input_name: str, *rest: Any) -> click.Option:
        option = make_option(ctx, flyte_ctx, input_name, *rest)
        return _gathering(option) if input_name == REPEATABLE else option

    pyflyte_run.to_click_option = to_click_option


_install()
