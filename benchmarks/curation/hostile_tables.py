"""Hostile Parquet and Arrow files for hostile.py, registered with the kinds of hostile_inputs.py."""

from __future__ import annotations

import struct
from pathlib import Path

from hostile_inputs import MIB, kind, picture, sparse


@kind("refused")
def parquet_dictionary(folder: Path) -> None:
    """1 MiB, 4,096 times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), pa.array([bytes(MIB)], pa.binary()))
    table = pa.table({"image": image, "text": ["a"] * 4096})
    pq.write_table(table, folder / "x.parquet", compression="zstd", store_schema=False)


@kind("refused")
def parquet_dictionary_of_80_mib(folder: Path) -> None:
    """80 MiB, 64 times: one batch would have 5 GiB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(80 * MIB)], pa.binary()))
    table = pa.table({"image": image, "text": ["a"] * 64})
    limit = 2**30
    pq.write_table(table, folder / "x.parquet", compression="zstd", store_schema=False, dictionary_pagesize_limit=limit)


@kind("refused")
def parquet_page_of_1_gib(folder: Path) -> None:
    _parquet_page(folder, 32)


@kind("refused")
def parquet_page_of_128_mib(folder: Path) -> None:
    """Not far over the cap of 104 MiB, and made within a second."""
    _parquet_page(folder, 4)


def _parquet_page(folder: Path, values: int) -> None:
    """One page of values of 32 MiB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array([bytes(32 * MIB)] * values, pa.binary()), "text": ["a"] * values})
    pq.write_table(table, folder / "x.parquet", compression="zstd", use_dictionary=False)


@kind("read")
def parquet_pages_under_the_cap(folder: Path) -> None:
    """Row groups of one page of 103 MiB, not compressed, and one snappy."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [np.random.default_rng(i).bytes(103 * MIB // 2) for i in range(2)]
    table = pa.table({"image": pa.array(data, pa.binary()), "text": ["a", "b"]})
    for name, compression in (("x", "none"), ("y", "snappy")):
        pq.write_table(table, folder / f"{name}.parquet", compression=compression, use_dictionary=False)


@kind("refused")
def parquet_shared_prefixes(folder: Path) -> None:
    """DELTA_BYTE_ARRAY: 16 MiB once, then 999 values that repeat it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array([bytes(16 * MIB)] * 64, pa.binary()), "text": ["a"] * 64})
    encoding = {"image": "DELTA_BYTE_ARRAY", "text": "PLAIN"}
    pq.write_table(table, folder / "x.parquet", use_dictionary=False, column_encoding=encoding)


@kind("read or refused")
def parquet_50_million_nulls(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    with pq.ParquetWriter(folder / "x.parquet", schema, write_statistics=False) as writer:
        for _ in range(5):
            count = 10_000_000
            table = pa.table({"image": pa.nulls(count, pa.binary()), "text": pa.nulls(count, pa.string())})
            writer.write_table(table, row_group_size=count)


@kind("refused")
def parquet_list_of_20_million(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.ListArray.from_arrays(pa.array([0, 20_000_000], pa.int32()), pa.nulls(20_000_000, pa.string()))
    pq.write_table(pa.table({"image": [picture()], "text": texts}), folder / "x.parquet")


@kind("read or refused")
def parquet_nested_1000(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind_of = pa.int32()
    for _ in range(1000):
        kind_of = pa.struct([("a", kind_of)])
    table = pa.table({"image": [picture()], "text": ["a"], "deep": pa.nulls(1, kind_of)})
    pq.write_table(table, folder / "x.parquet")


@kind("read or refused")
def parquet_20000_columns(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"column_{i}": pa.nulls(1, pa.int32()) for i in range(20_000)}
    pq.write_table(pa.table({"image": [picture()], "text": ["a"], **columns}), folder / "x.parquet")


@kind("read or refused")
def parquet_20000_row_groups(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [picture(1)] * 20_000, "text": ["a"] * 20_000})
    pq.write_table(table, folder / "x.parquet", row_group_size=1)


@kind("refused")
def parquet_footer_of_4_gib(folder: Path) -> None:
    sparse(folder / "x.parquet", b"PAR1", 2**32, struct.pack("<I", 2**32 - 16) + b"PAR1")


@kind("read or refused")
def metadata_parquet_dictionary(folder: Path) -> None:
    """A caption of 1 MiB for each of 2,000 images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(i))
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["a" * (MIB - 1)]))
    names = [f"{i}.png" for i in range(2000)]
    pq.write_table(pa.table({"file_name": names, "text": text}), folder / "metadata.parquet", store_schema=False)


@kind("refused")
def arrow_compressed(folder: Path) -> None:
    import pyarrow as pa

    batch = pa.record_batch({"image": pa.array([bytes(512 * MIB)] * 2, pa.large_binary()), "text": ["a", "b"]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(folder / "x.arrow"), "wb") as file,
        pa.ipc.new_stream(file, batch.schema, options=options) as writer,
    ):
        writer.write_batch(batch)


@kind("read")
def arrow_of_1_gib(folder: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for _ in range(4):
            writer.write_batch(pa.record_batch({"image": [bytes(32 * MIB)] * 8, "text": ["a"] * 8}, schema))
