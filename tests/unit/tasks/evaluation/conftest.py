"""Fixtures of tests of evaluation tasks."""

from evaluated import model  # noqa: F401
