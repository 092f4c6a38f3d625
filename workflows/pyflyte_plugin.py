"""The plugin of pyflyte: repeated --overrides, and the arguments of remote runs. flytekit loads it through the entry
point `flytekit.configuration.plugin` of pyproject.toml (docs/decisions/workflows.md). flytekit imports this module
while it loads; import flytekit before it."""

from __future__ import annotations

from typing import Any

from click import Group
from flytekit.configuration.plugin import FlytekitPlugin

from workflows.command_line import join_overrides
from workflows.remote_run import prepare


class RepeatableOverrides(FlytekitPlugin):
    """flytekit's own plugin, with arguments rewritten before click parses them."""

    @staticmethod
    def configure_pyflyte_cli(main: Group) -> Group:
        make_context = main.make_context

        def joined(info_name: str | None, args: list[str], *rest: Any, **options: Any) -> Any:
            return make_context(info_name, prepare(join_overrides(args)), *rest, **options)

        main.make_context = joined  # type: ignore[method-assign]
        return main
