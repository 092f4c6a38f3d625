"""Shared by the judges: the spec whose digest is their revision, weights at a known revision, and the self-test.

weights + settings --spec--> revision          an answer is cached under it
probes --answer--> answers == those recorded   or the judge is refused before it answers anything
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.files import file_sha256
from eval.judging.protocols import Request, digest_of

if TYPE_CHECKING:
    from PIL import Image

RECORDS = Path(__file__).parent / "selftests"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = 0.02  # processors differ in the last bits, other models in more


@dataclass(frozen=True)
class Probe:
    """A question about a made image. `expected`: the answer of any working weights; None if there is none."""

    request: Request
    expected: Any = None


class BaseJudge:
    """See eval.judging.protocols.Judge. A subclass sets `name` and `model` and has `answer_one`; with weights or settings
    it passes its own `spec`, and has `probes`."""

    name: str
    model: str

    def __init__(self, spec: Mapping[str, Any] | None = None):
        """
        Args:
            spec: None for a rule without weights: its class, the code of its module, and the libraries that decode images.
        """
        if spec is None:
            own = type(self)
            try:
                code = file_sha256(inspect.getfile(own))
            except (TypeError, OSError) as error:
                raise ValueError(
                    f"the code of {own.__name__} is in no file, so that its answers could not be told from those of other "
                    "code: put it into a module, or pass a spec"
                ) from error
            versions = libraries("numpy", "pillow")
            spec = {"class": f"{own.__module__}.{own.__qualname__}", "code": f"sha256:{code}", "libraries": versions}
        self.spec: Mapping[str, Any] = dict(spec)
        self.revision = digest_of(self.spec)

    def answer_one(self, request: Request) -> Any:
        """The answer as a JSON value. It must not depend on other requests."""
        raise NotImplementedError

    def probes(self) -> Sequence[Probe]:
        return ()

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        return [self.answer_one(request) for request in requests]

    def comparable(self, answer: Any) -> Any:
        """The part of a probe's answer that is equal on all processors."""
        return answer

    def selftest(self) -> None:
        """Answers the probes, and compares with the expected and the recorded answers.

        Raises:
            ValueError: an answer differs, or the record was made with another spec.
        """
        record = read_record(self.name)
        if record is not None and (differences := list(spec_differences(record["spec"], dict(self.spec)))):
            raise ValueError(
                f"the self-test of judge {self.name} is stale: it was recorded with {'; '.join(differences)}. Install "
                f"what it was recorded with, or record it again: python -m eval.judges.selftest {self.name}"
            )
        for number, (probe, answer) in enumerate(zip(self.probes(), self._probe_answers(), strict=True)):
            wanted = [probe.expected] if probe.expected is not None else []
            wanted += [record["answers"][number]] if record is not None else []
            for value in wanted:
                if not close(answer, value):
                    raise ValueError(
                        f"judge {self.name} fails its self-test: it answers {answer!r} to probe {number}, not {value!r}"
                    )

    def _probe_answers(self) -> list[Any]:
        return [self.comparable(answer) for answer in self.answer([probe.request for probe in self.probes()])]

    def record(self, folder: Path = RECORDS) -> Path:
        """Records the answers to the probes, which later self-tests must reproduce."""
        path = folder / f"{self.name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"spec": dict(self.spec), "answers": self._probe_answers()}, indent=1, ensure_ascii=False)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def read_record(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """{"spec", "answers"} of a judge, or None if it was not recorded.

    Raises:
        ValueError: the file is damaged.
    """
    path = (folder or RECORDS) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"spec": dict(record["spec"]), "answers": list(record["answers"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a self-test: {error}") from error


def spec_differences(recorded: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """ "libraries.torch = '2.12.0', and it is '2.13.0'" for each value that differs."""
    for key in sorted({*recorded, *present}):
        old, new = recorded.get(key), present.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from spec_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} = {old!r}, and it is {new!r}"


def close(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether JSON values are equal; numbers may differ by `tolerance`, absolute or relative to the larger."""
    if isinstance(a, str) or isinstance(b, str) or a is None or b is None:
        return a == b
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, Sequence):
        return isinstance(b, Sequence) and len(a) == len(b) and all(map(close, a, b, [tolerance] * len(a)))
    return isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def libraries(*names: str) -> dict[str, str]:
    """{package: installed version}.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        return {name: metadata.version(name) for name in names}
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"package {error.name!r} is not installed: this judge needs {', '.join(names)}") from error


def package_folder(package: str, distribution: str) -> Path:
    """The folder of an installed package, without importing it: some import removed modules.

    Raises:
        ValueError: it is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"package {distribution!r} is not installed; its weights are this judge's")
    return Path(spec.origin).parent


def check_sha256(path: Path, sha256: str) -> Path:
    """`path`, if its bytes are the expected ones.

    Raises:
        ValueError: no such file, or another one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; its package should bring it")
    actual = file_sha256(path)
    if actual != sha256:
        raise ValueError(f"{path} has the SHA-256 {actual}, and this judge's weights have {sha256}")
    return path


def only_image(request: Request) -> Image.Image:
    assert len(request.images) == 1, "asked about one image"
    return request.images[0].convert("RGB")


def unit_pixels(image: Image.Image, size_px: int) -> np.ndarray:
    """[3, size_px, size_px] float32 in [0, 1]: the whole image made square by Pillow, bicubic with antialias."""
    from PIL import Image

    resized = image.convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.ascontiguousarray((np.asarray(resized, dtype=np.float32) / 255).transpose(2, 0, 1))


def clip_pixels(image: Image.Image, size_px: int) -> np.ndarray:
    """[3, size_px, size_px] float32, as by open_clip's `image_transform` for OpenAI's CLIP: the short side resized to
    `size_px` (bicubic), the centre cropped, normalised by CLIP's mean and deviation.

    The crop is torchvision's CenterCrop, which rounds half a pixel to even. transformers' CLIP processor rounds down:
    if the long side is 3, 7, 11, ... pixels too long, its crop is one pixel off.
    """
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    width, height = int(size_px * width / short), int(size_px * height / short)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + size_px, top + size_px)), dtype=np.float32) / 255
    return ((pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Weights:
    """Where weights come from: a repository of the Hub at a revision, or a directory.

    identity: "repository@commit", or "sha256:..." of a directory's safetensors.
    official: whether it is the repository that the class names; a directory never is.
    """

    place: str
    revision: str | None
    identity: str
    official: bool


def refuse_shadow(repository: str) -> None:
    """
    Raises:
        ValueError: the working directory has a folder of the repository's name, which transformers would read instead of the
            pinned commit.
    """
    if not repository.startswith(("./", "../", "/")) and Path(repository).exists():
        raise ValueError(
            f"{repository} is on the Hub, and there is also a folder ./{repository}, which would be read in its place: "
            f"write ./{repository} for the folder, or run elsewhere"
        )


def resolve(repository: str, at: str | None = None) -> Weights:
    """The weights of `repository` at a revision, or in a directory.

    Args:
        at: a commit, tag or branch of the Hub, or the path of a directory; None is the branch "main".

    Raises:
        ValueError: neither on the Hub nor in its cache; a directory without safetensors; or a folder of the repository's
            name in the working directory, which transformers would read instead.
    """
    if at is not None and (Path(at).is_dir() or "/" in at):
        files = sorted(Path(at).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{at} has no *.safetensors; it must be a directory of {repository}'s class")
        digest = digest_of([[file.name, file_sha256(file)] for file in files])
        return Weights(at, None, f"sha256:{digest}", official=False)
    refuse_shadow(repository)
    from huggingface_hub import hf_hub_download

    try:  # the cached file's folder is named by the commit
        config = Path(hf_hub_download(repository, "config.json", revision=at))
    except Exception as error:  # errors of the network, the Hub or the cache
        raise ValueError(
            f"{repository} at {at or 'main'} is neither in the Hub's cache nor can it be downloaded "
            f"({type(error).__name__}): {error}"
        ) from error
    commit = config.parent.name
    return Weights(repository, commit, f"{repository}@{commit}", official=True)
