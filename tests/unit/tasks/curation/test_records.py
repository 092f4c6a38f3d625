import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from eval.benchmarks.shapes.vocabulary import BACKGROUNDS
from tasks.curation import records
from tasks.curation.config import SourceConfig
from tasks.curation.sources.made import defects, scenes
from tasks.curation.sources.made.scenes import Scene

CONFIG = SourceConfig(scenes=120, scene_size_px=64, defect_fraction=0.2, digits=10, shards=3, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus: its directory, its report, {key: (record, truth row)}."""
    directory = tmp_path_factory.mktemp("records")
    report = records.make_records(CONFIG, directory)
    truth = {row["key"]: row for row in pq.read_table(directory / "truth.parquet").to_pylist()}
    return directory, report, {r.key: (r, truth.get(r.key)) for r in records.read_records(directory)}


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def of_kind(made, kind):
    found = [(record, row) for record, row in made[2].values() if row and row["defect"] == kind]
    assert found, kind
    return found


def opened(record):
    image = Image.open(io.BytesIO(record.data))
    image.load()
    return image


def mean_difference(a, b):
    return np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean()


def test_the_table_tells_what_the_shards_hold(made):
    directory, report, found = made
    rows = pq.read_table(directory / "records.parquet").to_pylist()
    assert [row["key"] for row in rows] == list(found) and len(rows) == report["records"] == 120 + 24 + 10
    for row in rows:
        record = found[row["key"]][0]
        assert row["record_id"] == hashlib.sha256(record.data).hexdigest()
        assert (row["ext"], row["num_bytes"], row["captions"]) == (
            record.ext,
            len(record.data),
            record.sidecar["captions"],
        )
        assert row["source"] == record.sidecar["source"] and row["synthetic"] == (row["source"] == "scenes")
        with tarfile.open(directory / f"shards/{row['shard']:05d}.tar") as tar:
            assert tar.extractfile(f"{row['key']}.{row['ext']}").read() == record.data
    assert report["sources"] == {"digits": 10, "scenes": 144} and report["shards"] == 3
    assert json.loads((directory / "report.json").read_text()) == report
    assert {row["ext"] for row in rows} == {"png", "jpg"}


def test_shards_made_apart_and_gathered_equal_one_run(made, tmp_path):
    parts = []
    for spec in reversed(records.plan_shards(CONFIG)):
        parts.append(tmp_path / f"part{spec.shard}")
        parts[-1].mkdir()
        report = records.make_shard(CONFIG, spec.shard, parts[-1])
        assert report["records"] == spec.count > 0 and report["shards"] == 1
    (tmp_path / "all").mkdir()
    assert records.gather(parts, tmp_path / "all") == made[1]
    assert files(tmp_path / "all") == files(made[0])


def test_another_number_of_shards_gives_the_same_records(made, tmp_path):
    records.make_records(CONFIG.model_copy(update={"shards": 200}), tmp_path)
    again = {record.key: record for record in records.read_records(tmp_path)}
    assert again == {key: record for key, (record, _) in made[2].items()}
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 200, "empty shards are there as well"


def test_another_seed_gives_other_scenes(made, tmp_path):
    records.make_records(CONFIG.model_copy(update={"seed": 6}), tmp_path)
    same = [r.key for r in records.read_records(tmp_path) if made[2].get(r.key, [None])[0] == r]
    assert len(same) < 10  # some digits, and the text files


def test_shards_carry_no_time_and_no_owner(made):
    with tarfile.open(made[0] / "shards/00000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o644)}


def test_good_scenes_show_what_the_truth_says(made):
    good = [(record, row) for record, row in made[2].values() if row and not row["defect"]]
    assert len(good) == 120
    for record, row in good:
        scene = Scene.from_dict(json.loads(row["scene"]))
        assert opened(record).size == (scene.width_px, scene.height_px)
        assert mean_difference(opened(record), scenes.render(scene)) < 2
        assert len(record.sidecar["captions"]) >= 4


def test_every_defect_is_planted_at_least_once(tmp_path):
    report = records.make_records(SourceConfig(scenes=5, scene_size_px=32, shards=1), tmp_path)
    assert report["defects"] == dict.fromkeys(sorted(defects.KINDS), 1) and report["records"] == 5 + 12


def test_no_defects_when_none_are_asked_for(tmp_path):
    report = records.make_records(SourceConfig(scenes=5, scene_size_px=32, defect_fraction=0), tmp_path)
    assert report["defects"] == {} and report["records"] == 5


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


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source.scenes"):
        records.plan_shards(SourceConfig())
    with pytest.raises(ValueError, match="source.shards=3"):
        records.make_shard(CONFIG, 3, tmp_path)


def test_gather_refuses_a_shard_given_twice_and_what_is_none(made, tmp_path):
    for name in ("twice", "none", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="another shard directory"):
        records.gather([made[0], made[0]], tmp_path / "twice")
    with pytest.raises(ValueError, match="not a records directory"):
        records.gather([tmp_path / "other"], tmp_path / "none")
    with pytest.raises(ValueError, match="no shards"):
        records.gather([], tmp_path / "none")


def test_a_broken_shard_is_one_error(made, tmp_path):
    data = (made[0] / "shards/00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:5000])
    with pytest.raises(ValueError, match="cut.tar"):
        list(records.read_shard(tmp_path / "cut.tar"))
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ValueError, match="no sidecar"):
        list(records.read_shard(tmp_path / "bare.tar"))
