from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import captions_in, details_in, left_out, picture, read_records, write

from tasks.curation.config import SourceConfig
from tasks.curation.sources import parquet
from tasks.curation.sources.base import open_corpus, write_corpus

JPEG, PNG = picture(1, "JPEG"), picture(2)


def refused(path, *words, **config):
    with pytest.raises(ValueError) as caught:
        read_records(path, **config)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_parquet_with_bytes_structs_and_lists_of_one(tmp_path):
    images = [picture(i, "JPEG" if i % 2 else "PNG") for i in range(7)]
    pq.write_table(pa.table({"image": images, "text": [f"t{i}" for i in range(7)]}), tmp_path / "plain.parquet")
    structs = [{"bytes": PNG, "path": "x/y.webp"}, {"bytes": None, "path": "gone.png"}, None]
    table = pa.table({"Image": structs, "captions": [["a", "b"], ["c"], []], "caption": [None, "d", "e"]})
    pq.write_table(table, tmp_path / "structs.parquet")
    lists = pa.table({"images": [[PNG], [PNG, JPEG], [], [JPEG]], "Prompt": ["one", "two", "three", "four"]})
    pq.write_table(lists, tmp_path / "lists.parquet")
    records, account = read_records(tmp_path)
    assert [(r.locator, r.ext, r.captions) for r in records] == [
        ("lists.parquet:0", "png", ["one"]),
        ("lists.parquet:3", "jpg", ["four"]),
        *((f"plain.parquet:{i}", "jpg" if i % 2 else "png", [f"t{i}"]) for i in range(7)),
        ("structs.parquet:0", "webp", ["a", "b"]),
    ]
    assert [record.data for record in records] == [PNG, JPEG, *images, PNG]
    assert account.skipped == {
        "row with several images": (1, "lists.parquet:1"),
        "row without image bytes": (3, "lists.parquet:2"),
    }
    assert account.seen == 3 + 4 + 7 + 3


@pytest.mark.parametrize("column", ["TEXT", " text", "Caption", "prompt", "raw", "captions"])
def test_caption_columns_match_in_any_case_and_with_blanks(tmp_path, column):
    pq.write_table(pa.table({"image": [PNG], column: ["a caption"]}), tmp_path / "x.parquet")
    assert captions_in(tmp_path) == {"x.parquet:0": ["a caption"]}


def test_each_record_of_a_table_without_a_caption_column_names_the_columns(tmp_path):
    pq.write_table(pa.table({"image": [PNG], "blurb": ["a caption"]}), tmp_path / "x.parquet")
    why = details_in(tmp_path)["x.parquet:0"]
    assert why.startswith("x.parquet has columns image, blurb; it needs") and why.endswith("in source.caption_columns")
    assert captions_in(tmp_path, caption_columns=("blurb",)) == {"x.parquet:0": ["a caption"]}
    pq.write_table(pa.table([[PNG], ["a"], ["b"]], names=["image", "text", "text"]), tmp_path / "x.parquet")
    refused(tmp_path, "'text' twice")
    labels = {f"label{i}": ["x"] for i in range(13)}
    pq.write_table(pa.table({"image": [PNG]} | labels), tmp_path / "x.parquet")
    assert "label10 and 2 more; it needs" in details_in(tmp_path)["x.parquet:0"]


def test_parquet_with_paths_only_is_refused_and_one_without_an_image_column_is_counted(tmp_path):
    table = pa.table({"image": [{"bytes": None, "path": f"/d/{i}.png"} for i in range(4)], "text": ["x"] * 4},
                     pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())]))  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, "a.parquet: none of 4 rows has image bytes; they name files (image.path)")
    pq.write_table(pa.table({"url": ["x"], "text": ["y"]}), tmp_path / "a.parquet")
    refused(tmp_path, "has no image", "1 x .parquet without image bytes (a.parquet)")
    write(tmp_path, {"a.png": PNG})
    assert left_out(tmp_path) == {".parquet without image bytes": 1}


@pytest.mark.parametrize("sizes", [(2, 0, 2), (2, 0), (0, 2), (0, 0, 1, 0, 3)])
def test_row_groups_without_rows_change_nothing(tmp_path, sizes):
    pictures, texts = [picture(i) for i in range(sum(sizes))], [f"t{i}" for i in range(sum(sizes))]
    table, done = pa.table({"image": pictures, "text": texts}), 0
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(done, size))
            done += size
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == len(sizes)
    for images_per_shard in (1, 2, 3, 100):
        records, _ = read_records(tmp_path, images_per_shard=images_per_shard)
        assert [(r.locator, r.data, r.captions) for r in records] == [
            (f"x.parquet:{i}", pictures[i], [texts[i]]) for i in range(done)
        ]


def test_a_caption_that_is_no_text_is_a_problem_of_its_row(tmp_path):
    values = pa.StringArray.from_buffers(3, *pa.array([b"caf\xe9", b"whole", b"a" * (2**20 + 1)]).buffers()[1:])
    pq.write_table(pa.table({"image": [PNG] * 3, "text": values}), tmp_path / "x.parquet")
    records, _ = read_records(tmp_path)
    assert [r.problem for r in records] == ["unreadable_caption", "", "unreadable_caption"]
    assert "x.parquet:0" in records[0].detail and "1 MiB" in records[2].detail
    assert captions_in(tmp_path, encoding="latin-1")["x.parquet:0"] == ["café"]


def test_row_groups_become_shards_up_to_their_length_and_are_read_alone(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    table = pa.table({"image": [picture(i) for i in range(20)], "text": [str(i) for i in range(20)]})
    pq.write_table(table, source / "x.parquet", row_group_size=4)
    write_corpus(SourceConfig(images_per_shard=8), str(source), tmp_path / "corpus")
    corpus = open_corpus(tmp_path / "corpus")
    shards = list(corpus.shards())
    assert [(s.first_row, s.num_rows) for s in shards] == [(0, 8), (8, 8), (16, 4)]
    groups = []
    real = parquet._batch_rows
    monkeypatch.setattr(parquet, "_batch_rows", lambda *args: groups.append(args[-1]) or real(*args))
    from tasks.curation.sources.base import Account

    assert [r.captions for r in corpus.read(shards[1], Account())] == [[str(i)] for i in range(8, 16)]
    assert groups == [2, 3]


def test_another_name_of_a_column_is_another_shard(tmp_path):
    ids = []
    for column in ("text", "caption"):
        pq.write_table(pa.table({"image": [PNG], column: ["x"]}), tmp_path / "x.parquet")
        write_corpus(SourceConfig(), str(tmp_path / "x.parquet"), tmp_path / column)
        ids += [shard.shard_id for shard in open_corpus(tmp_path / column).shards()]
    assert len(set(ids)) == 2


def test_a_broken_table_is_named(tmp_path):
    pq.write_table(pa.table({"image": [PNG] * 50, "text": ["x"] * 50}), tmp_path / "y.parquet", compression="zstd")
    data = (tmp_path / "y.parquet").read_bytes()
    for content in (b"", b"no parquet", data[:-20], data[:-4] + b"PAR2", data[:-8] + b"\xff\xff\xff\x7fPAR1"):
        (tmp_path / "y.parquet").write_bytes(content)
        refused(tmp_path, str(tmp_path / "y.parquet"), "not a readable Parquet")
    (tmp_path / "y.parquet").write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    refused(tmp_path, str(tmp_path / "y.parquet"), "not a readable Parquet")


def test_bombs_of_dictionaries_pages_prefixes_nulls_and_lists_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "RATIO_FREE_BYTES", 2**22)
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 2**22)
    monkeypatch.setattr(parquet, "MAX_ROWS", 10_000)
    monkeypatch.setattr(parquet, "MAX_VALUES", 10_000)

    def refuse(table, word, **options):
        pq.write_table(pa.table(table), tmp_path / "x.parquet", compression="zstd", store_schema=False, **options)
        refused(tmp_path, "x.parquet", word)

    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([bytes(2**17)], pa.binary()))
    refuse({"image": repeated, "text": ["x"] * 200}, "MiB of images in")
    refuse({"image": [bytes(2**20)] * 8, "text": ["x"] * 8}, "a page of 8 MiB", use_dictionary=False)
    delta = {"image": "DELTA_BYTE_ARRAY", "text": "PLAIN"}
    refuse({"image": [bytes(2**18)] * 64, "text": ["x"] * 64}, "MiB of images in", use_dictionary=False, column_encoding=delta)  # fmt: skip
    monkeypatch.setattr(parquet, "MAX_DICTIONARY_BYTES", 2**16)
    refuse({"image": repeated, "text": ["x"] * 200}, "a dictionary of 0 MiB is over")
    nulls = {"image": pa.nulls(50_000, pa.binary()), "text": pa.nulls(50_000, pa.string())}
    refuse(nulls, "claims 50,000 rows", write_statistics=False)
    texts = pa.ListArray.from_arrays(pa.array([0, 50_000], pa.int32()), pa.nulls(50_000, pa.string()))
    refuse({"image": [PNG], "text": texts}, "values in 1 rows")


def test_values_that_share_a_dictionary_are_read_in_batches_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2**20)
    sizes = []
    real = parquet.tables.records
    monkeypatch.setattr(parquet.tables, "records", lambda batch, *rest: sizes.append(len(batch)) or real(batch, *rest))
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 20, pa.int32()), pa.array([bytes(2**19)], pa.binary()))
    pq.write_table(pa.table({"image": image, "text": ["x"] * 20}), tmp_path / "x.parquet", store_schema=False)
    assert len(read_records(tmp_path)[0]) == 20 and max(sizes) == 1


@pytest.mark.parametrize("split", [False, True])
def test_a_data_set_saved_to_disk_is_read(tmp_path, split):
    rows = {"image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(5)], "text": [f"t{i}" for i in range(5)]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict({"train": made}) if split else made
    saved.save_to_disk(tmp_path / "saved", **({} if split else {"num_shards": 2}))
    folder = tmp_path / "saved/train" if split else tmp_path / "saved"
    write(folder, {"cache-0123.arrow": next(folder.glob("data-*.arrow")).read_bytes()})
    records, account = read_records(tmp_path / "saved")
    assert [(r.data, r.captions) for r in records] == [(picture(i), [f"t{i}"]) for i in range(5)]
    reasons = {reason: count for reason, (count, _) in account.skipped.items()}
    assert reasons.pop("cache of a saved data set") == 1 and set(reasons) == {".json"}


def test_arrow_files_of_both_formats_are_read_and_broken_or_compressed_ones_are_named(tmp_path):
    batch = pa.record_batch({"image": [PNG] * 100, "text": [str(i) for i in range(100)]})

    def save(make, **options):
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, make(file, batch.schema, **options) as writer:
            writer.write_batch(batch)
            writer.write_batch(batch)

    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        save(make)
        assert [r.captions for r in read_records(tmp_path)[0]] == [[str(i % 100)] for i in range(200)]
    data = (tmp_path / "x.arrow").read_bytes()
    for content in (b"", b"x" * 100, data[: len(data) // 2], data[:-8], data[:600] + b"\xff" * 200 + data[800:]):
        (tmp_path / "x.arrow").write_bytes(content)
        refused(tmp_path, str(tmp_path / "x.arrow"))
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        save(make, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        refused(tmp_path, "x.arrow", "compressed")


def test_an_arrow_file_with_paths_only_is_refused_and_one_without_captions_names_its_columns(tmp_path):
    def save(table):
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    save(pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}] * 3, kind), "text": ["x"] * 3}))
    refused(tmp_path, "x.arrow", "none of its rows has image bytes", "image.path")
    save(pa.table({"image": [PNG], "label": ["x"]}))
    assert captions_in(tmp_path) == {"x.arrow:0": []}
    assert details_in(tmp_path)["x.arrow:0"].startswith("x.arrow has columns image, label; it needs a caption column")


@pytest.mark.parametrize("cells", [[1, 2], [{"en": "a barn"}, {"en": "a boat"}]])
def test_a_caption_column_of_another_kind_than_text_makes_its_rows_unreadable(tmp_path, cells):
    images = [picture(0), picture(1)]
    pq.write_table(pa.table({"image": images, "text": cells}), tmp_path / "x.parquet")
    records, _ = read_records(tmp_path)
    assert [record.problem for record in records] == ["unreadable_caption"] * 2
    assert f"x.parquet:0 has a caption that is not text but of the type {type(cells[0]).__name__}" in records[0].detail
    pq.write_table(pa.table({"image": images, "text": cells, "caption": ["a", "b"]}), tmp_path / "x.parquet")
    assert list(captions_in(tmp_path).values()) == [["a"], ["b"]]


@pytest.mark.parametrize(
    "image",
    [
        pa.array([PNG], pa.binary_view()),
        pa.array([PNG], pa.binary(len(PNG))),
        pa.array([[PNG]], pa.list_(pa.binary(), 1)),
        pa.array([PNG]).dictionary_encode(),
    ],
    ids=["view", "fixed size", "fixed list", "dictionary"],
)
@pytest.mark.parametrize("text", [pa.array(["x"], pa.string_view()), pa.array(["x"]).dictionary_encode()], ids=["view", "dictionary"])  # fmt: skip
def test_arrow_s_other_types_of_bytes_and_text_are_read(tmp_path, image, text):
    pq.write_table(pa.table({"image": image, "text": text}), tmp_path / "x.parquet")
    records, _ = read_records(tmp_path)
    assert [(record.data, record.captions) for record in records] == [(PNG, ["x"])]


def test_a_footer_whose_statistics_end_arrow_s_process_is_refused_in_one_sentence(tmp_path):
    seeds = Path(__file__).parents[4] / "fuzz/seeds"
    (broken,) = seeds.glob("parquet-*")
    (tmp_path / "x.parquet").write_bytes(broken.read_bytes())
    with pytest.raises(ValueError, match="x.parquet is not a readable Parquet file"):
        read_records(tmp_path)


def test_a_further_column_of_images_is_named(tmp_path):
    table = pa.table({"jpg": [JPEG], "image": [PNG], "text": ["x"]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_stream(str(tmp_path / "y.arrow"), table.schema) as writer:
        writer.write_table(table)
    records, account = read_records(tmp_path)
    assert [record.data for record in records] == [PNG, PNG]
    assert account.skipped == {"further column of images": (2, "x.parquet: jpg")}
