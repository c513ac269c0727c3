"""What a change has gained: rollouts and evaluations of another commit of this package and of this one, by turns.

    git worktree add ../old d420c42
    python benchmarks/commits.py --old ../old [--cases vocabulary compiled evaluation profile] [--repeats 3] [--write]

Each side is a process of its own, and waits while another is measured. Compiled sides start twice: into an empty cache of
compiled code, and with what the first has left there. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from pairs import DEMO, VOCABULARIES, load, prompts_for, without_ends
from rollout import DOCUMENT, Report, policy_with_share
from switchkd.records import Sampling
from switchkd.rollout.policies import Switch
from timing import THREADS, conditions, write_section

HERE = Path(__file__).parents[1]
OLD, NEW, COMPILED = "old commit", "eager", "compiled"
CASES = {
    "vocabulary": [(name, 32) for name in VOCABULARIES if name != "50k"],
    "compiled": [(DEMO, 128), ("5M/40M", 128)],
    "evaluation": [(DEMO, 96)],
    "profile": [(name, 32) for name in VOCABULARIES if name != "50k"],
    "quick": [("quick", 8)],
}
MS_A_TOKEN, HEADS = 2.0, 1.0  # At 131,072 ids: in all, and beyond the heads in units of what those take.
SHOWN = 8  # Operators of a profile.
TIMES_FASTER = {DEMO: 2.0, "5M/40M": 1.3}


class Side:
    """A process that does a task as often as it is asked."""

    def __init__(self, checkout: Path, task: dict[str, Any], cache: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(checkout / "src"),
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "OMP_NUM_THREADS": str(THREADS),
        }
        command = [sys.executable, str(Path(__file__).with_name("side.py")), json.dumps(task)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self) -> dict[str, Any]:
        """What the task took this time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side stopped; its error stands above")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(
    task: dict[str, Any], sides: dict[str, Path], repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The medians of each side, and the seconds that compiling takes: into an empty cache, and with a full one."""
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        running = {
            name: stack.enter_context(Side(path, task | {"compiled": name == COMPILED}, cache))
            for name, path in sides.items()
        }
        first = {name: side.run()["seconds"] for name, side in running.items()}
        turns = [{name: side.run() for name, side in running.items()} for _ in range(repeats)]
        found = {name: _median([turn[name] for turn in turns]) for name in sides}
        compiling = {}
        if COMPILED in sides:
            compiling["empty"] = first[COMPILED] - found[COMPILED]["seconds"]
            with Side(sides[COMPILED], task | {"compiled": True}, cache) as again:
                compiling["full"] = again.run()["seconds"] - found[COMPILED]["seconds"]
        if task.get("heads_of"):
            with Side(HERE, task | {"compiled": False, "heads": True}, cache) as watched:
                watched.run()
                found[NEW]["heads"] = median(watched.run()["heads"] for _ in range(repeats))
    return found, compiling


def _median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return turns[0] | {"seconds": median(turn["seconds"] for turn in turns)}


def task_of(kind: str, name: str, new_tokens: int, folder: Path) -> dict[str, Any]:
    """What the sides are given: a pair as files, prompts and, for rollouts, the threshold of half of the tokens."""
    pair = load(name)
    task: dict[str, Any] = {"folder": None, "new_tokens": new_tokens, "threads": THREADS, "kind": "rollouts"}
    task |= {"heads": False, "heads_of": kind == "vocabulary", "compiled": False}
    if kind == "profile":
        task["kind"] = kind
    if kind == "evaluation":
        return task | {"kind": "answers", "prompts": prompts_for(pair, 200)}
    prompts = prompts_for(pair, 8)
    policy = policy_with_share(without_ends(pair), prompts, 0.5, Sampling(max_new_tokens=new_tokens))
    assert isinstance(policy, Switch)
    if name != DEMO:
        for role, model in pair.models.items():
            model.save_pretrained(folder / role)
        task["folder"] = str(folder)
    return task | {"prompts": prompts, "threshold": policy.threshold}


def row(name: str, side: str, found: dict[str, dict[str, Any]], compiling: dict[str, float]) -> tuple[str, ...]:
    """A side's row of the table."""
    mine, old = found[side], found[OLD]
    same = sum(ours == theirs for ours, theirs in zip(mine["texts"], old["texts"], strict=True))
    cost, heads = 1e3 * mine["seconds"] / mine["tokens"], found.get(NEW, mine).get("heads", 0.0)
    beyond = mine["seconds"] / heads - 1 if heads else None
    times, targets = old["seconds"] / mine["seconds"], []
    if side != OLD and name == "131k":
        targets = [f"{MS_A_TOKEN:g} ms {_verdict(cost <= MS_A_TOKEN)}"]
        targets += [f"{HEADS:g} beyond the heads {_verdict(beyond is not None and beyond <= HEADS)}"]
    if side == COMPILED and name in TIMES_FASTER:
        targets = [f"{TIMES_FASTER[name]} {_verdict(times >= TIMES_FASTER[name])}"]
    parts = " / ".join(f"{part / sum(mine['parts']):.0%}" for part in mine.get("parts", []))
    seconds = [f"{value:.0f} s" for value in compiling.values()] if side == COMPILED else []
    return (
        name,
        side,
        f"{mine['share']:.0%}" if "share" in mine else "",
        f"{mine['seconds']:.2f} s",
        f"{cost:.2f} ms",
        f"{mine['tokens'] / mine['seconds']:,.0f}",
        parts,
        "" if beyond is None else f"{beyond:.2f}",
        f"{times:.2f}",
        "; ".join(targets),
        f"{same}/{len(mine['texts'])}",
        ", then ".join(seconds),
    )


def profile(names: Sequence[str] | None, old: Path, *, compiles: bool) -> Report:
    """The operators in which one SWITCH call of each side spends its time."""
    report = Report("Profile", ("pair", "side", "a call, profiled", "operators by their own share of the time"), [])
    sides = {OLD: old, NEW: HERE} | ({COMPILED: HERE} if compiles else {})
    for name, new_tokens in CASES["profile"]:
        if name not in (names or [name]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            task = task_of("profile", name, new_tokens, Path(folder))
            for side, path in sides.items():
                with Side(path, task | {"compiled": side == COMPILED}, folder) as running:
                    found = running.run()
                parts = [
                    f"{share:.0%} {operator.removeprefix('aten::')}" for share, operator in found["operators"][:SHOWN]
                ]
                report.rows.append((name, side, f"{found['seconds']:.2f} s", ", ".join(parts)))
                print(report.rows[-1], flush=True)
    return report


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def run(case: str, names: Sequence[str] | None, old: Path, repeats: int, *, compiles: bool) -> Report:
    """The table of a case."""
    report = Report(
        case.capitalize(),
        (
            "pair", "side", "teacher share", "a call", "a token", "tokens/s", "student / teacher / decision",
            "beyond heads / heads",
            "times faster", "target", "same rows", "compiling, then in a second process",
        ),
        [],
    )  # fmt: skip
    sides = {OLD: old, NEW: HERE} | ({} if case == "evaluation" or not compiles else {COMPILED: HERE})
    for name, new_tokens in CASES[case]:
        if name not in (names or [name]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found, compiling = measure(task_of(case, name, new_tokens, Path(folder)), sides, repeats)
        report.rows += [row(name, side, found, compiling) for side in sides]
        print(*report.rows[-len(sides) :], sep="\n", flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the other commit")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if case != "quick"])
    parser.add_argument("--models", nargs="+", help="those of the cases alone")
    parser.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--write", action="store_true", help="update the sections in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    console = Console(width=None if Console().is_terminal else 180)
    git = ["git", "-C", str(options.old), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    for case in options.cases:
        compiles = not options.eager
        if case == "profile":
            report = profile(options.models, options.old, compiles=compiles)
        else:
            report = run(case, options.models, options.old, options.repeats, compiles=compiles)
        found = f"{conditions()}; against commit {commit}; median of {options.repeats} by turns."
        console.print(report.table(), found)
        if options.write:
            write_section(
                options.document, " ".join([case, *(options.models or [])]), f"{found}\n\n{report.markdown()}"
            )


if __name__ == "__main__":
    main()
