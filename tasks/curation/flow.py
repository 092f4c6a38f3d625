"""What the tasks of curation do, without Flyte: each step over its shards, by parts that are made once.

`curate_source` runs all steps in one process, as `python -m tasks.curation.check` and the tests do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.curation import decide, ledger, score, selections
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.curated import CORPUS
from tasks.curation.scorers import scorer_revisions
from tasks.curation.sources import base
from tasks.curation.sources.base import Account, Shard
from tasks.envs import CACHE_VERSIONS
from tasks.manifest import MANIFEST, load_manifest
from tasks.store import INDEX, LOCATIONS, Part, fetch_part, group_range, make_part, read_index, write_index

REPORT_PAGE = "report.html"
# Where shards are is no part of what a corpus is; its digest of them is in report.json.
CORPUS_LOGS = (base.SHARDS_TABLE,)
CURATED_LOGS = (LOCATIONS, f"{CORPUS}/{base.SHARDS_TABLE}")
