import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from eval.benchmarks.shapes.vocabulary import BACKGROUNDS
from tasks.curation.config import SourceConfig
from tasks.curation.sources.base import Account, made_corpus, open_corpus, write_made_shard
from tasks.curation.sources.made import defects, scenes
from tasks.curation.sources.made.scenes import Scene

CONFIG = SourceConfig(scenes=120, scene_size_px=64, defect_fraction=0.2, digits=10, shards=3, seed=5)


def make(config, directory):
    """Makes all shards and the corpus; returns its report, and {key: (record, truth row)}."""
    parts = [directory / f"part{i}" for i in range(config.shards)]
    for i, part in enumerate(parts):
        write_made_shard(config, i, part)
    report = made_corpus(parts, directory / "corpus")
    return report, records_in(directory / "corpus", parts)


def records_in(corpus_dir, parts):
    truth = {}
    for part in parts:
        if (part / "truth.parquet").is_file():
            truth |= {row["key"]: row for row in pq.read_table(part / "truth.parquet").to_pylist()}
    corpus = open_corpus(corpus_dir)
    records = [record for shard in corpus.shards() for record in corpus.read(shard, Account())]
    assert len({record.key for record in records}) == len(records)
    return {record.key: (record, truth.get(record.key)) for record in records}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    return directory, *make(CONFIG, directory)


def of_kind(made, kind):
    result = [(record, row) for record, row in made[2].values() if row and row["defect"] == kind]
    assert result, kind
    return result


def opened(record):
    image = Image.open(io.BytesIO(record.data))
    image.load()
    return image


def mean_difference(a, b):
    return np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean()


def plain(records):
    return {key: record._replace(row=0, locator="") for key, (record, _) in records.items()}


def test_the_table_says_what_the_tars_have(made):
    directory, report, records = made
    shards = list(open_corpus(directory / "corpus").shards())
    assert sum(shard.num_rows for shard in shards) == len(records) == report["images"] == 120 + 24 + 10
    for i, shard in enumerate(shards):
        content = (directory / f"part{i}/{i:05d}.tar").read_bytes()
        assert (shard.kind, shard.size_bytes, shard.source) == ("tar", len(content), "scenes")
        assert shard.digest == hashlib.sha256(content).hexdigest() and shard.uri.endswith(f"part{i}/{i:05d}.tar")
    assert report["sources"] == {"digits": 10, "scenes": 144} and report["without_caption"] == 0
    for record, _ in records.values():
        assert record.source == record.key.partition("-")[0] and not record.problem
        assert record.locator.endswith(f".tar:{record.key}.{record.ext}")
    assert {record.ext for record, _ in records.values()} == {"png", "jpg"}


def test_the_bytes_of_a_shard_depend_on_its_numbers_alone(tmp_path):
    """The corpus of the smoke recipe's first 20 scenes at its seed, as it has been since the first release."""
    write_made_shard(SourceConfig(scenes=20, scene_size_px=32, digits=3, shards=2), 1, tmp_path / "a")
    write_made_shard(SourceConfig(scenes=20, scene_size_px=32, digits=3, shards=2), 1, tmp_path / "b")
    assert (tmp_path / "a/00001.tar").read_bytes() == (tmp_path / "b/00001.tar").read_bytes()
    with tarfile.open(tmp_path / "a/00001.tar") as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in members} == {(0, 0, "", 0o644)}
        assert [m.name for m in members[:4]] == [
            "scenes-0000010.png",
            "scenes-0000010.json",
            "scenes-0000011.png",
            "scenes-0000011.json",
        ]
        sidecar = json.loads(tar.extractfile("scenes-0000010.json").read())
        assert set(sidecar) == {"captions", "source", "meta"}


@pytest.mark.slow
def test_another_number_of_shards_gives_the_same_records(made, tmp_path):
    _, records = make(CONFIG.model_copy(update={"shards": 200}), tmp_path)
    assert plain(records) == plain(made[2])
    assert len(list(tmp_path.glob("part*/*.tar"))) == 200, "empty shards are there as well"


def test_another_seed_gives_other_scenes(made, tmp_path):
    _, records = make(CONFIG.model_copy(update={"seed": 6}), tmp_path)
    before, after = plain(made[2]), plain(records)
    assert sum(after[key] == before.get(key) for key in after) < 10  # some digits, and the text files


def test_parts_that_will_be_read_elsewhere_are_named_by_their_uris(made, tmp_path):
    parts = [made[0] / f"part{i}" for i in (2, 0, 1)]
    report = made_corpus(parts, tmp_path / "far", [f"s3://bucket/parts/{i}" for i in (2, 0, 1)])
    uris = [shard.uri for shard in open_corpus(tmp_path / "far").shards()]
    assert uris == [f"s3://bucket/parts/{i}/{i:05d}.tar" for i in range(3)]
    assert report["digest"] == made[1]["digest"], "wherever they are, and in whatever order they are given"
    with pytest.raises(ValueError, match="given twice"):
        made_corpus([parts[0], parts[0]], tmp_path / "twice")


def test_good_scenes_show_what_the_truth_says(made):
    good = [(record, row) for record, row in made[2].values() if row and not row["defect"]]
    assert len(good) == 120
    for record, row in good:
        scene = Scene.from_dict(json.loads(row["scene"]))
        assert opened(record).size == (scene.width_px, scene.height_px)
        assert mean_difference(opened(record), scenes.render(scene)) < 2
        assert len(record.captions) >= 4


def test_every_defect_is_planted_at_least_once(tmp_path):
    report, _ = make(SourceConfig(scenes=5, scene_size_px=32, shards=1), tmp_path)
    assert report["defects"] == dict.fromkeys(sorted(defects.KINDS), 1) and report["images"] == 5 + 12


def test_no_defects_when_none_are_asked_for(tmp_path):
    report, _ = make(SourceConfig(scenes=5, scene_size_px=32, defect_fraction=0, shards=1), tmp_path)
    assert report["defects"] == {} and report["images"] == 5


def test_duplicates_name_their_original(made):
    for record, row in of_kind(made, "exact_duplicate"):
        original = made[2][row["original"]][0]
        assert record.data == original.data and record.key > original.key
    for record, row in of_kind(made, "near_duplicate"):
        original = made[2][row["original"]][0]
        assert record.data != original.data
        upright = opened(record).convert("RGB").resize(opened(original).size)
        assert mean_difference(upright, opened(original)) < 12
    assert {row["original"] for _, row in made[2].values() if row and row["defect"] not in defects.DUPLICATES} == {""}


@pytest.mark.parametrize("kind", defects.KINDS)
def test_exactly_the_unreadable_kinds_do_not_decode(made, kind):
    for record, _ in of_kind(made, kind):
        if kind in defects.UNREADABLE:
            with pytest.raises(OSError):
                opened(record)
        else:
            assert opened(record).width > 0


def test_plain_images_are_plain_to_the_eye(made):
    for record, _ in of_kind(made, "blank"):
        assert len(opened(record).getcolors()) == 1
    for record, _ in of_kind(made, "near_uniform"):
        pixels = np.asarray(opened(record), float)
        assert len(opened(record).getcolors(10**5)) > 1 and pixels.std((0, 1)).max() < 3


def test_tiny_and_extreme_images_are_so(made):
    assert all(min(opened(record).size) <= 16 for record, _ in of_kind(made, "tiny"))
    for record, _ in of_kind(made, "extreme_aspect"):
        assert max(opened(record).size) / min(opened(record).size) == 5


def test_a_rotated_image_displays_as_its_scene(made):
    for record, row in of_kind(made, "exif_rotated"):
        stored = opened(record)
        assert stored.getexif()[defects.ORIENTATION_TAG] in range(2, 9)
        scene = scenes.render(Scene.from_dict(json.loads(row["scene"])))
        assert mean_difference(ImageOps.exif_transpose(stored), scene) < 2
        assert stored.size != scene.size or mean_difference(stored, scene) > 2


@pytest.mark.parametrize("orientation", range(2, 9))
def test_each_orientation_is_stored_as_viewers_undo_it(orientation):
    image = scenes.render(scenes.sample_scene(np.random.default_rng(3), 64, aspect=1.5))
    exif = Image.Exif()
    exif[defects.ORIENTATION_TAG] = orientation
    data = defects.encode(image.transpose(defects.STORED[orientation]), "png", exif)
    assert mean_difference(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), image) == 0


def test_a_watermark_changes_the_whole_picture_a_border_encloses_it(made):
    for record, row in of_kind(made, "watermark"):
        scene = scenes.render(Scene.from_dict(json.loads(row["scene"])))
        changed = np.abs(np.asarray(opened(record), float) - np.asarray(scene, float)).max(2) > 25
        assert all(part.any() for half in np.array_split(changed, 3) for part in np.array_split(half, 3, axis=1))
    for record, _ in of_kind(made, "border"):
        pixels = np.asarray(opened(record).convert("RGB"), float)
        inside = np.abs(pixels - pixels[0, 0]).max(2) > 40
        assert 0.1 < inside.mean() < 0.3 and not inside[: len(inside) // 5].any()
        assert tuple(pixels[0, 0]) not in BACKGROUNDS.values()


def test_a_corpus_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source.scenes"):
        write_made_shard(SourceConfig(), 0, tmp_path)
    with pytest.raises(ValueError, match="source.shards=3"):
        write_made_shard(CONFIG, 3, tmp_path)


def test_a_made_tar_that_was_changed_or_cut_off_is_named(made, tmp_path):
    write_made_shard(SourceConfig(scenes=5, scene_size_px=32, shards=1), 0, tmp_path / "part")
    made_corpus([tmp_path / "part"], tmp_path / "corpus")
    tar = tmp_path / "part/00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    corpus = open_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match="00000.tar is not what it was"):
        list(corpus.read(next(corpus.shards()), Account()))


def test_a_made_corpus_is_a_users_source_too(made, tmp_path):
    from source_files import read_records

    records, account = read_records(made[0] / "part0")
    assert [r.captions for r in records] == [r.captions for r, _ in list(made[2].values())[: len(records)]]
    assert set(account.skipped) == {".json", ".parquet without image bytes"}
