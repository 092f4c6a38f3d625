"""The plugin of pyflyte, loaded through flytekit's own extension point: the entry point `flytekit.configuration.plugin` of
pyproject.toml (docs/decisions/workflows.md). flytekit imports this module while it loads; import flytekit before it."""

from __future__ import annotations

from typing import Any

from click import Group
from flytekit.configuration.plugin import FlytekitPlugin

from workflows.command_line import join_overrides


class RepeatableOverrides(FlytekitPlugin):
    """The plugin: flytekit's own one, but for the repeated option."""

    @staticmethod
    def configure_pyflyte_cli(main: Group) -> Group:
        make_context = main.make_context

        def joined(info_name: str | None, args: list[str], *rest: Any, **options: Any) -> Any:
            return make_context(info_name, join_overrides(args), *rest, **options)

        main.make_context = joined  # type: ignore[method-assign]
        return main
