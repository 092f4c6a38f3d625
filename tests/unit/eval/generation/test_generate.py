"""Images depend on (benchmark, prompt id, image, seed) alone, and a resumed run writes no image again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from killed import identities, kill_at_random
from parameters import slow_except
from PIL import Image

from eval.config import EvalConfig
from eval.generation.generate import generate, image_seed
from eval.official.layouts import export, join_tiles

PROMPTS = [
    {"tag": "colors", "include": [], "prompt": "a photo of a red circle"},
    {"tag": "single_object", "include": [], "prompt": "a photo of a square", "images": 3},
]
CONFIG = EvalConfig(seeds=(0, 5), images_per_prompt=2, image_size_px=16, batch_size=3)
FILES = 2 * (1 + 3) * 2


class Noise:
    """A sampler whose image shows its prompt and noise seed, and its place in the batch in the last bit, as real kernels
    do; it can be stopped after some calls."""

    def __init__(self, calls=10**9, by_place=True):
        self.calls, self.by_place, self.batches = calls, by_place, []
        self.settings = {"name": "noise"}

    def __call__(self, prompts, seeds, height, width):
        if len(self.batches) == self.calls:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        places = range(len(prompts)) if self.by_place else [0] * len(prompts)
        return [self.image(*item, height, width) for item in zip(prompts, seeds, places, strict=True)]

    def image(self, prompt, seed, place, height, width):
        rng = np.random.default_rng([seed, len(prompt), place])
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def quiet(_):
    pass


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def pictures(root):
    return {name: data for name, data in contents(root).items() if name.endswith(".png")}


def test_the_layout_is_geneval_s_in_a_folder_per_seed(tmp_path):
    report = generate(Noise(), PROMPTS, CONFIG, tmp_path, log=quiet)
    files = contents(tmp_path / "images")
    assert report["expected"] == report["made"] == FILES == sum(name.endswith(".png") for name in files)
    assert "seed5/00001/samples/0005.png" in files and "seed5/00001/samples/0006.png" not in files
    metadata = json.loads(files["seed0/00001/metadata.jsonl"])
    assert {**metadata, **PROMPTS[1]} == metadata and metadata["id"]
    assert [json.loads(line) for line in files["prompts.jsonl"].splitlines()][1] == metadata


def test_settings_and_provenance_are_recorded(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path, provenance={"merged": "abc"}, log=quiet)
    recorded = json.loads((tmp_path / "images" / "generation.json").read_text())
    assert recorded["sampler"] == {"name": "noise"} and recorded["provenance"] == {"merged": "abc"}
    assert recorded["config"]["guidance_scale"] == 8.0 and recorded["config"]["seeds"] == [0, 5]
    assert recorded["prompt_rewriting"] is None


def test_every_image_has_its_own_noise():
    keys = [(b, p, i, s) for b in ("shapes", "geneval") for p in ("a", "b", "a1") for i in range(12) for s in range(12)]
    seeds = {image_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= s < 2**63 for s in seeds)
    assert image_seed("shapes", "a", 1, 2) == image_seed("shapes", "a", 1, 2)


def test_an_image_does_not_depend_on_the_other_prompts_their_order_or_the_number_of_seeds(tmp_path):
    """A prompt keeps its noise when the other prompts change."""
    sampler = Noise(by_place=False)
    generate(sampler, PROMPTS, CONFIG, tmp_path / "a", log=quiet)
    generate(sampler, PROMPTS[::-1], CONFIG.model_copy(update={"seeds": (5,)}), tmp_path / "b", log=quiet)
    a, b = pictures(tmp_path / "a/images"), pictures(tmp_path / "b/images")
    assert a["seed5/00001/samples/0002.png"] == b["seed5/00000/samples/0002.png"]
    assert a["seed5/00000/samples/0001.png"] == b["seed5/00001/samples/0001.png"]
    assert a["seed0/00000/samples/0001.png"] != a["seed5/00000/samples/0001.png"]


def test_equal_prompts_have_noise_of_their_own(tmp_path):
    generate(Noise(by_place=False), PROMPTS[:1] * 3, CONFIG, tmp_path, log=quiet)
    assert len(set(pictures(tmp_path).values())) == 3 * 2 * 2


def test_a_stopped_run_resumes_and_equals_an_unbroken_one(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path / "whole", log=quiet)
    with pytest.raises(KeyboardInterrupt):
        generate(Noise(calls=3), PROMPTS, CONFIG, tmp_path / "broken", log=quiet)
    # as after a kill between two images of a batch
    (tmp_path / "broken/images/seed0/00001/samples/0004.png").unlink(missing_ok=True)
    rest = Noise()
    report = generate(rest, PROMPTS, CONFIG, tmp_path / "broken", log=quiet)
    assert report["made"] + report["kept"] == FILES and report["kept"] >= 2
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    done = Noise()
    assert generate(done, PROMPTS, CONFIG, tmp_path / "broken", log=quiet)["made"] == 0 and not done.batches


MANY = [{"tag": "colors", "include": [], "prompt": f"prompt {i}"} for i in range(23)]


class Gated(Noise):
    """Writes the batches that it gets to a file, and takes a few milliseconds for each."""

    def __init__(self, gate, log):
        super().__init__()
        self.gate, self.log = gate, log

    def __call__(self, prompts, seeds, height, width):
        with open(self.log, "a") as file:
            file.write(f"{seeds[0]}\n")
        self.gate.pass_through()
        time.sleep(0.003)
        return super().__call__(prompts, seeds, height, width)


@pytest.mark.slow
def test_twenty_kills_lose_at_most_a_batch_each_and_write_nothing_again(tmp_path):
    prompts = [{"tag": "colors", "include": [], "prompt": f"prompt {i}"} for i in range(60)]
    generate(Noise(), prompts, CONFIG, tmp_path / "whole", log=quiet)
    run, log, rng = tmp_path / "killed", tmp_path / "asked", random.Random(1)
    log.touch()

    def files():
        return [p for p in run.rglob("*") if p.is_file() and not p.name.startswith(".")]

    def work(gate):
        generate(Gated(gate, log), prompts, CONFIG, run, log=quiet)

    before = {}
    for _ in range(20):  # 120 batches of two images: at most five are begun each time
        asked, exist = len(log.read_text().split()), len(pictures(run))
        kill_at_random(work, rng, batches=4)
        after = identities(files())
        assert before.items() <= after.items()
        before = after
        batches = len(log.read_text().split()) - asked
        assert (
            len(pictures(run)) - exist >= 2 * (batches - 1) - 1
        )  # the batch of the kill, and the unfinished one before
    assert 0 < len(pictures(run)) < 240
    generate(Noise(), prompts, CONFIG, run, log=quiet)
    assert before.items() <= identities(files()).items()
    assert {p.relative_to(run).as_posix(): p.read_bytes() for p in files()} == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_before_or_after_any_file_takes_its_name_loses_at_most_a_batch(tmp_path):
    generate(Noise(), MANY, CONFIG, tmp_path / "whole", log=quiet)
    rng, run = random.Random(1), tmp_path / "killed"

    def attempt(after: int, before_it: bool) -> None:
        real, count = os.replace, 0

        def replace(source, target):
            nonlocal count
            count += 1
            if count < after:
                return real(source, target)
            if not before_it:
                real(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        generate(Noise(), MANY, CONFIG, run, log=quiet)

    before = {}
    for _ in range(20):
        child = multiprocessing.get_context("fork").Process(
            target=attempt, args=(rng.randint(1, 7), rng.random() < 0.5)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        after = identities(run.rglob("[0-9]*.png"))
        assert before.items() <= after.items()
        before = after
    made = Noise()
    exist = len(pictures(run))
    generate(made, MANY, CONFIG, run, log=quiet)
    assert pictures(run / "images") == pictures(tmp_path / "whole/images")
    assert sum(made.batches) <= len(pictures(tmp_path / "whole")) - exist + CONFIG.batch_size


@pytest.mark.parametrize("shards", slow_except([2], [1, 2, 5]))
def test_any_number_of_shards_gives_the_same_bytes(tmp_path, shards):
    generate(Noise(), MANY, CONFIG, tmp_path / "whole", log=quiet)
    reports = [
        generate(Noise(), MANY, CONFIG, tmp_path / "parts", shard=i, shards=shards, log=quiet)
        for i in reversed(range(shards))
    ]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    made, expected = (sum(report[key] for report in reports) for key in ("made", "expected"))
    assert made == expected == len(pictures(tmp_path / "whole"))
    with pytest.raises(ValueError, match="must be one of"):
        generate(Noise(), MANY, CONFIG, tmp_path / "parts", shard=shards, shards=shards, log=quiet)


def test_a_batch_has_whole_prompts_of_one_seed(tmp_path):
    sampler = Noise()
    generate(sampler, PROMPTS, CONFIG, tmp_path, log=quiet)
    assert sampler.batches == [2, 3, 3, 2, 3, 3]  # 2 images, then 6 in calls of at most 3; for each seed


def test_the_batch_size_does_not_change_the_images_of_a_sampler_that_does_not_mind(tmp_path):
    generate(Noise(by_place=False), PROMPTS, CONFIG, tmp_path / "a", log=quiet)
    big = CONFIG.model_copy(update={"batch_size": 16})
    generate(Noise(by_place=False), PROMPTS, big, tmp_path / "b", log=quiet)
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path, log=quiet)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="prompts.jsonl differs"):
        generate(Noise(), PROMPTS[:1], CONFIG, tmp_path, log=quiet)
    with pytest.raises(ValueError, match="generation.json differs"):
        generate(Noise(), PROMPTS, CONFIG.model_copy(update={"guidance_scale": 2.0}), tmp_path, log=quiet)
    assert contents(tmp_path) == before
    rescored = CONFIG.model_copy(update={"judge_batch_size": 2})
    assert generate(Noise(), PROMPTS, rescored, tmp_path, log=quiet)["made"] == 0


def test_a_sampler_that_drops_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned 1 images for 2 prompts"):
        generate(lambda p, s, h, w: [Image.new("RGB", (w, h))], PROMPTS, CONFIG, tmp_path, log=quiet)


def test_seeds_must_differ():
    with pytest.raises(ValueError, match="different"):
        EvalConfig(seeds=(0, 0))


class Prompted(Noise):
    def __call__(self, prompts, seeds, height, width):
        self.seen = [*getattr(self, "seen", []), *prompts]
        return super().__call__(prompts, seeds, height, width)


def test_prompts_are_rewritten_only_by_a_file_and_the_run_says_so(tmp_path):
    rewrites = tmp_path / "rewrites.json"
    rewrites.write_text(json.dumps({p["prompt"]: p["prompt"].upper() for p in PROMPTS}))
    sampler = Prompted()
    config = CONFIG.model_copy(update={"prompt_rewrites": str(rewrites)})
    generate(sampler, PROMPTS, config, tmp_path / "run", log=quiet)
    assert set(sampler.seen) == {p["prompt"].upper() for p in PROMPTS}
    recorded = json.loads((tmp_path / "run/images/generation.json").read_text())
    assert recorded["prompt_rewriting"]["prompts"] == 2 and len(recorded["prompt_rewriting"]["sha256"]) == 64
    with pytest.raises(ValueError, match="differs"):  # without the file it is another run
        generate(Prompted(), PROMPTS, CONFIG, tmp_path / "run", log=quiet)
    plain = Prompted()
    generate(plain, PROMPTS, CONFIG, tmp_path / "plain", log=quiet)
    assert set(plain.seen) == {p["prompt"] for p in PROMPTS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"a photo of a square": " "}', "must be a JSON object"),
        ('{"a photo of a square": "x"}', "lack 1 of 2 prompts, the first 'a photo of a red circle'"),
    ],
)
def test_a_file_of_rewrites_that_would_mix_two_benchmarks_is_refused(tmp_path, text, message):
    (tmp_path / "rewrites.json").write_text(text)
    config = CONFIG.model_copy(update={"prompt_rewrites": str(tmp_path / "rewrites.json")})
    with pytest.raises(ValueError, match=message):
        generate(Noise(), PROMPTS, config, tmp_path / "run", log=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200])
def test_a_prompt_id_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="prompt id"):
        generate(Noise(), [{**PROMPTS[0], "id": name}], CONFIG, tmp_path, log=quiet)


FOUR = EvalConfig(seeds=(0,), images_per_prompt=4, image_size_px=16, batch_size=8)


def test_official_layouts_hold_the_same_pixels(tmp_path):
    prompts = [{**PROMPTS[0], "id": "dpg_1"}, {**PROMPTS[0], "tag": "anime", "id": "002"}]
    generate(Noise(), prompts, FOUR, tmp_path / "run", log=quiet)
    images = tmp_path / "run/images"
    assert export(images, tmp_path / "geneval", "geneval") == 2 * 5
    assert pictures(tmp_path / "geneval") == pictures(images / "seed0")
    assert export(images, tmp_path / "dpg", "dpg") == 2 and export(images, tmp_path / "oneig", "oneig", model="m") == 2
    tiles = [np.asarray(Image.open(images / f"seed0/00001/samples/{i:04d}.png")) for i in range(4)]
    expected = np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)])
    for path in (tmp_path / "dpg/002.png", tmp_path / "oneig/images/anime/m/002.webp"):
        assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert export(images, tmp_path / "dpg", "dpg") == 0  # nothing is written again


def test_a_grid_of_tiles_that_differ_in_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tiles of one size"):
        join_tiles([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
    with pytest.raises(ValueError, match="layout 'x'"):
        export(tmp_path, tmp_path, "x")
