"""How much a recipe's scores differ between machines: whole runs with other threads and other instruction sets.

    python benchmarks/evaluation/other_machines.py [--recipe tiny] [--out other_machines/] [--only one_thread,two_threads]

Each environment runs `reproduce` from raw records to the scorecard in a separate home, so that nothing comes from the
cache: the VAE, the text encoder and every step of training round differently, as on another machine. A second start
continues where the first stopped, and reads finished runs from --out. Prints a table and writes other_machines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# MKL_CBWR names the code path of MKL's products; ONEDNN_MAX_CPU_ISA that of oneDNN's convolutions, ATEN_CPU_CAPABILITY
# that of PyTorch's own loops.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "one_thread": {"OMP_NUM_THREADS": "1"},
    "two_threads": {"OMP_NUM_THREADS": "2"},
    "mkl_compatible": {"MKL_CBWR": "COMPATIBLE"},
    "onednn_sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "torch_default": {"ATEN_CPU_CAPABILITY": "default"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("other_machines"))
    parser.add_argument("--only", help=f"some of {', '.join(ENVIRONMENTS)}, separated by commas")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ENVIRONMENTS)
    if unknown := sorted(set(names) - set(ENVIRONMENTS)):
        parser.error(f"--only: {unknown[0]} is none of {', '.join(ENVIRONMENTS)}")
    print(f"command: {shlex.join(sys.argv)}\nmachine: {platform.platform()}, {os.cpu_count()} CPUs", flush=True)
    results = {name: run(name, args.recipe, args.overrides, args.out.resolve()) for name in names}
    overall = [result["overall"] for result in results.values()]
    spread = statistics.stdev(overall) if len(overall) > 1 else None
    (args.out / "other_machines.json").write_text(json.dumps({"runs": results, "deviation": spread}, indent=1) + "\n")
    tasks = list(next(iter(results.values())))
    print(f"| environment | {' | '.join(tasks)} |\n{'| --- ' * (len(tasks) + 1)}|")
    for name, result in results.items():
        print(f"| {name} | {' | '.join(str(result[task]) for task in tasks)} |")
    if spread is not None:
        print(f"standard deviation of overall between environments: {spread:.3f}")


def run(name: str, recipe: str, overrides: list[str], out: Path) -> dict[str, float]:
    """Scores and minutes of one environment's run, or of an earlier finished run."""
    home = out / name
    home.mkdir(parents=True, exist_ok=True)
    finished = home / "result.json"
    if not finished.is_file():
        command = [str(Path(sys.executable).with_name("pyflyte")), "run", "workflows/reproduce.py", "reproduce"]
        command += ["--recipe", recipe, *(part for change in overrides for part in ("--overrides", change))]
        own = {"HOME": str(home), "NUCLEUS_HOME": str(home / "nucleus"), **ENVIRONMENTS[name]}
        begin = time.monotonic()
        with open(home / "log.txt", "w") as log:
            done = subprocess.run(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
        text = (home / "log.txt").read_text()
        results = re.search(r"scorecard=([^\s,)]+)", text[text.rfind("Reproduction(") :])
        if done.returncode or results is None:
            raise SystemExit(f"{name} failed with exit status {done.returncode}: see {home / 'log.txt'}")
        card = json.loads((Path(results[1]) / "scorecard.json").read_text())
        result = {"overall": card["overall"]["mean"], **{task: v["mean"] for task, v in card["tasks"].items()}}
        if card.get("held_out"):
            result["held_out"] = card["held_out"]["overall"]["mean"]
        result = {task: round(value, 3) for task, value in result.items()}
        finished.write_text(json.dumps(result | {"minutes": round((time.monotonic() - begin) / 60, 1)}) + "\n")
    return json.loads(finished.read_text())


if __name__ == "__main__":
    main()
