"""Table engines: DuckDB inside the process, or Spark beyond one machine. Both run the same SQL text, but for the
search for pairs of hashes (near.py).

The text keeps to what both understand. Where they differ, each registers a function of the same name:

    hamming(a, b)          bits in which two BIGINTs differ
    hex_to_int(text)       the number that up to 15 hexadecimal digits give
    number_text(x)         a DOUBLE with up to 4 decimals, without zeros at its end
    words_up_to(list, n)   the numbers of a list that are at most n, rising
    nth(list, i)           one element, counted from 1
    round_half_even(x)     to a whole number, as numpy.rint does
    explode(list)          a row for each element
    bin_of(x, low, high, n)   which of n equal bins has x; values out of range count in the outermost

A row's `position` is its part's number * 2**32 + its row in the part, so that no engine has to number rows.
"""

# ruff: noqa: S608 (SQL of our own names and numbers; texts are quoted by engines.quoted)
from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from model.logs import get_logger
from tasks.curation.scoring.workers import container_limit

logger = get_logger(__name__)

MEMORY = ""  # of DuckDB's buffers, such as 1GB; empty: half of the container's memory, at least LEAST_MEMORY_BYTES
LEAST_MEMORY_BYTES = 10**9  # and outside of a container
BATCH_ROWS = 10_000
PART = 2**32  # positions of a part
_UNSAFE = ("'", "\\")


class Engine(Protocol):
    """Runs SQL over tables that may be larger than memory."""

    work_dir: Path
    in_process: bool  # all rows are on this machine

    def scan(self, name: str, files: Mapping[str, int]) -> None:
        """A view over Parquet files of one schema; its column `part` has the number of each row's file."""

    def create(self, name: str, query: str) -> None:
        """A table with the rows of a query; replaces one of the same name."""

    def append(self, name: str, query: str) -> None:
        """Adds the rows of a query to a table."""

    def load(self, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]] | Iterable[pa.Table]) -> None:
        """A table of rows that Python made, or of tables with these columns."""

    def batches(self, query: str) -> Iterator[pa.Table]:
        """The rows of a query, in its order."""

    def close(self) -> None: ...


def rows_of(engine: Engine, query: str) -> Iterator[dict[str, Any]]:
    for table in engine.batches(query):
        yield from table.to_pylist()


def one(engine: Engine, query: str) -> Any:
    """The only value of a query."""
    (row,) = rows_of(engine, query)
    (value,) = row.values()
    return value


def open_engine(name: str, work_dir: str | os.PathLike) -> Engine:
    """
    Args:
        name: duckdb or spark.
        work_dir: for tables and what is spilled; all of Spark's executors must reach it.

    Raises:
        ValueError: Spark is not installed, or there is no Java.
    """
    return DuckDB(work_dir) if name == "duckdb" else Spark(work_dir)


def buffers() -> str:
    """Memory of DuckDB's buffers; the rest is spilled."""
    if MEMORY:
        return MEMORY
    limit = container_limit()
    if limit is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        logger.warning(
            f"curation: no memory limit of the container was read, so DuckDB has buffers of {LEAST_MEMORY_BYTES // 10**6} MB; too few "
            "for hundreds of millions of records (docs/scale.md)"
        )
    return f"{max(LEAST_MEMORY_BYTES, (limit or 0) // 2) // 10**6}MB"


class DuckDB:
    """In this process; tables are in one file, and at most `buffers()` of them in memory."""

    in_process = True

    FUNCTIONS = (
        "hamming(a, b) AS CAST(bit_count(xor(a, b)) AS INTEGER)",  # a TINYINT otherwise, whose sums overflow
        "hex_to_int(text) AS CAST(concat('0x', text) AS BIGINT)",
        "number_text(x) AS trim(TRAILING '.' FROM trim(TRAILING '0' FROM CAST(CAST(x AS DECIMAL(18, 4)) AS STRING)))",
        "words_up_to(list, n) AS list_sort(list_filter(list, lambda w: w <= n))",
        "nth(list, i) AS list_extract(list, i)",
        "size(list) AS len(list)",
        "array_min(list) AS list_min(list)",
        "array_max(list) AS list_max(list)",
        "round_half_even(x) AS CAST(round_even(x, 0) AS BIGINT)",
        "explode(list) AS unnest(list)",
        "bin_of(x, low, high, n) AS CAST(least(n - 1, greatest(0, floor((x - low) / (high - low) * n))) AS INTEGER)",
    )

    def __init__(self, work_dir: str | os.PathLike) -> None:
        import duckdb

        self.work_dir = Path(work_dir)
        settings = {"memory_limit": buffers(), "temp_directory": str(self.work_dir / "spill")}
        self._db = duckdb.connect(str(self.work_dir / "tables.duckdb"), config=settings)
        self._db.execute("SET preserve_insertion_order = false")
        # The statistics of a Parquet column leave NaN out, and DuckDB would take them for proof that there is none: a
        # missing score would count as the largest number, and too small a range of groups would end in an internal error.
        self._db.execute("SET disabled_optimizers = 'statistics_propagation'")
        for function in self.FUNCTIONS:
            self._db.execute(f"CREATE MACRO {function}")

    def scan(self, name: str, files: Mapping[str, int]) -> None:
        numbers = [{"path": path, "part": number} for path, number in files.items()]
        self.load(f"{name}_files", pa.schema([("path", pa.string()), ("part", pa.int64())]), numbers)
        listed = ", ".join(_file(path) for path in files)
        self._db.execute(
            f"CREATE OR REPLACE VIEW {name} AS SELECT s.* EXCLUDE (filename), f.part "
            f"FROM read_parquet([{listed}], filename = true) s JOIN {name}_files f ON s.filename = f.path"
        )

    def create(self, name: str, query: str) -> None:
        self._db.execute(f"CREATE OR REPLACE TABLE {name} AS {query}")

    def append(self, name: str, query: str) -> None:
        self._db.execute(f"INSERT INTO {name} {query}")

    def load(self, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]] | Iterable[pa.Table]) -> None:
        path = _write_rows(self.work_dir / f"{name}.parquet", schema, rows)
        self.create(name, f"SELECT * FROM read_parquet({_file(str(path))})")
        path.unlink()

    def batches(self, query: str) -> Iterator[pa.Table]:
        reader = self._db.cursor().sql(query).to_arrow_reader(BATCH_ROWS)
        for batch in reader:
            yield pa.Table.from_batches([batch])

    def close(self) -> None:
        self._db.close()


class Spark:
    """A session of the driver that runs this process, or a local one. Tables are Parquet under the work directory.

    NUCLEUS_SPARK_CONF: JSON of more settings of a session that starts here, such as {"spark.master": "local[2]"}.
    """

    in_process = False

    FUNCTIONS = (
        "hamming(a BIGINT, b BIGINT) RETURNS INT RETURN bit_count(a ^ b)",
        "hex_to_int(text STRING) RETURNS BIGINT RETURN CAST(conv(text, 16, 10) AS BIGINT)",
        "number_text(x DOUBLE) RETURNS STRING "
        "RETURN trim(TRAILING '.' FROM trim(TRAILING '0' FROM CAST(CAST(x AS DECIMAL(18, 4)) AS STRING)))",
        "words_up_to(list ARRAY<INT>, n INT) RETURNS ARRAY<INT> RETURN sort_array(filter(list, w -> w <= n))",
        "nth(list ARRAY<INT>, i BIGINT) RETURNS INT RETURN element_at(list, CAST(i AS INT))",
        "round_half_even(x DOUBLE) RETURNS BIGINT RETURN CAST(bround(x, 0) AS BIGINT)",
        "bin_of(x DOUBLE, low DOUBLE, high DOUBLE, n INT) RETURNS INT "
        "RETURN CAST(least(n - 1, greatest(0, floor((x - low) / (high - low) * n))) AS INT)",
    )

    def __init__(self, work_dir: str | os.PathLike) -> None:
        self.work_dir = Path(work_dir).resolve()
        self._spark = _session()
        for function in self.FUNCTIONS:
            self._spark.sql(f"CREATE OR REPLACE TEMPORARY FUNCTION {function}")

    def scan(self, name: str, files: Mapping[str, int]) -> None:
        from pyspark.sql import functions as f

        uris = {path if "://" in path else Path(path).resolve().as_uri(): number for path, number in files.items()}
        # Spark names local files file:/a or file:///a, as the reader likes.
        numbers = [{"path": _plain_uri(uri), "part": number} for uri, number in uris.items()]
        self.load(f"{name}_files", pa.schema([("path", pa.string()), ("part", pa.int64())]), numbers)
        frame = self._spark.read.parquet(*uris).withColumn(
            "path", f.regexp_replace(f.col("_metadata.file_path"), "^file:/+", "/")
        )
        frame.join(f.broadcast(self._spark.table(f"{name}_files")), "path").drop("path").createOrReplaceTempView(name)

    def create(self, name: str, query: str) -> None:
        # A new folder: the query may read the table that it replaces.
        self._write(name, query, str(self.work_dir / f"{name}-{uuid.uuid4().hex}"))

    def append(self, name: str, query: str) -> None:
        (folder,) = {Path(_plain_uri(path)).parent for path in self._spark.table(name).inputFiles()}
        self._write(name, query, str(folder))

    def _write(self, name: str, query: str, folder: str) -> None:
        self._spark.sql(query).write.mode("append").parquet(folder)
        self._spark.read.parquet(folder).createOrReplaceTempView(name)

    def load(self, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]] | Iterable[pa.Table]) -> None:
        folder = self.work_dir / f"{name}-{uuid.uuid4().hex}"
        folder.mkdir()
        _write_rows(folder / "rows.parquet", schema, rows)
        self._spark.read.parquet(str(folder)).createOrReplaceTempView(name)

    def batches(self, query: str) -> Iterator[pa.Table]:
        """Files of a sorted frame have its order by name."""
        folder = self.work_dir / f"rows-{uuid.uuid4().hex}"
        self._spark.sql(query).write.parquet(str(folder))
        for path in sorted(folder.glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    yield pa.Table.from_batches([batch])
        shutil.rmtree(folder)

    def close(self) -> None:
        """The session stays: it is the driver's."""


def _session() -> Any:
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ValueError("curation.engine=spark needs pyspark: pip install 'nucleus-flyte[spark]'") from error
    builder = SparkSession.builder.appName("curation")
    settings = {
        "spark.sql.parser.escapedStringLiterals": "true",  # a backslash is a backslash, as in DuckDB
        "spark.sql.session.timeZone": "UTC",
        "spark.ui.enabled": "false",
    } | json.loads(os.environ.get("NUCLEUS_SPARK_CONF", "{}"))
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Exception as error:
        if "JAVA" in str(error).upper():
            raise ValueError(
                "curation.engine=spark needs Java 17: set JAVA_HOME, or install openjdk-17-jre-headless"
            ) from error
        raise


def _plain_uri(uri: str) -> str:
    return "/" + uri[5:].lstrip("/") if uri.startswith("file:") else uri


def quoted(text: str) -> str:
    """SQL of a text, the same in both engines: quotes and backslashes, by which a text could end its literal in one of
    them and go on as SQL, are in no literal."""
    parts = [f"chr({ord(part)})" if part in _UNSAFE else f"'{part}'" for part in re.split(r"(['\\])", text) if part]
    return f"concat({', '.join(parts)})" if len(parts) > 1 else parts[0] if parts else "''"


def _file(path: str) -> str:
    """SQL of a path for DuckDB, which takes paths for patterns: a folder runs[12] would be a folder runs1 beside it."""
    return quoted(re.sub(r"([*?\[])", r"[\1]", path))


def _write_rows(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]] | Iterable[pa.Table]) -> Path:
    with pq.ParquetWriter(path, schema) as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows:
            if isinstance(row, pa.Table):
                writer.write_table(row)
                continue
            waiting.append(row)
            if len(waiting) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    return path
