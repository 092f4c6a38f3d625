"""The description of a source before any work."""

from __future__ import annotations

import pytest

from tasks.planning.source import check_source
from tasks.recipe import load_recipe


def test_a_placeholder_is_refused_without_a_look_at_it_and_both_ways_out_are_named():
    with pytest.raises(ValueError, match="source.path='s3://YOUR-BUCKET/.*placeholder.* --source .*or set source.path"):
        check_source(load_recipe("nucleus_17b").source.path, local=False)


def test_a_local_path_is_refused_only_on_a_cluster():
    for path in ("images/", ""):
        check_source(path, local=True)
    check_source("s3://bucket/images/", local=False)
    check_source("", local=False)
    with pytest.raises(ValueError, match="'images/' is a path of your machine"):
        check_source("images/", local=False)
