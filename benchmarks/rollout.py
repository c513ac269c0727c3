"""How fast rollouts are: against the reference engine, against transformers' generate, and what the teacher costs.

    python benchmarks/rollout.py [--models demo 5M/40M] [--batch 8] [--repeats 5] [--write] [--quick]

Both sides take turns in one process; each time is a median. Leave the machine idle otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pairs import DEMO, RANDOM_PAIRS, cost_ratio, load, prompts_for, with_ends, without_ends
from switchkd.analysis.calibration import calibrate
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling, teacher_share_of
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine, left_padded
from switchkd.rollout.speculative import SpeculativeEngine
from timing import THREADS, conditions, median_seconds, write_section

SHARES = (0.1, 0.3, 0.5, 1.0)
# Teacher shares by model and batch, as measured by default: about twenty minutes on two cores.
PLAN: dict[str, dict[int, tuple[float, ...]]] = {
    DEMO: {1: (0.5,), 8: SHARES, 32: (0.5,)},
    "5M/40M": {1: (0.5,), 8: SHARES, 32: (0.5,)},
    "10M/120M": {8: (0.1, 0.5, 1.0)},
}
# The teacher's cost shows on two sizes, and the largest pair would take minutes for it.
PRICED = (DEMO, "5M/40M", "quick")
QUICK: dict[str, dict[int, tuple[float, ...]]] = {"quick": {4: (0.5, 1.0)}}
# Target speedups over the reference engine by teacher share, for a batch of 8 and a teacher that costs 8 times the student.
TARGETS = {0.1: 3.0, 0.5: 2.0, 1.0: 1.7}
GENERATE_TARGET, PRICE_TARGET = 1.3, 1.5
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@dataclass
class Report:
    """A table that can be printed and written."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For the document."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_with_share(pair: ModelPair, prompts: Sequence[list[int]], share: float, sampling: Sampling) -> Policy:
    """The policy under which the teacher writes that share of the tokens, as closely as calibration gets."""
    if share == 1:
        return Teacher()
    engine, shape = SpeculativeEngine(pair), Switch(decay="constant")
    return calibrate(engine, prompts, sampling, teacher_share=share, policy=shape, tolerance=0.02).policy


def against_reference(
    name: str, pair: ModelPair, prompts: list[list[int]], policy: Policy, share: float, sampling: Sampling, repeats: int
) -> tuple[str, ...]:
    """Times and teacher forwards of both engines. Stops the benchmark if their tokens differ."""
    reference, engine = ReferenceEngine(pair, len(prompts)), SpeculativeEngine(pair, max_rows=len(prompts))
    results: dict[str, list[Rollout]] = {}

    def keep(side: str, run: Callable[..., list[Rollout]]) -> None:
        results[side] = run(prompts, policy, sampling)

    for side in (reference, engine):
        side.generate(prompts, policy, Sampling(max_new_tokens=4))
    sides = {
        "reference": partial(keep, "reference", reference.generate),
        "ours": partial(keep, "ours", engine.generate),
    }
    seconds = median_seconds(sides, repeats)
    same = _same_rows(results["ours"], results["reference"])
    forwards = max(len(rollout.token_ids) for rollout in results["reference"])
    ratio = seconds["reference"] / seconds["ours"]
    target = TARGETS.get(share) if len(prompts) == 8 and cost_ratio(pair) >= 8 else None
    return (
        name,
        f"{cost_ratio(pair):.1f}",
        str(len(prompts)),
        f"{teacher_share_of(results['ours']):.0%}",
        f"{seconds['reference']:.2f} s",
        f"{seconds['ours']:.2f} s",
        f"{ratio:.2f}",
        "" if target is None else f"{target} {'reached' if ratio >= target else 'missed'}",
        f"{forwards / engine.metrics.teacher_forwards:.2f}",
        f"{engine.metrics.acceptance:.2f}",
        f"{same}/{len(prompts)}",
    )


def _same_rows(ours: list[Rollout], theirs: list[Rollout]) -> int:
    """The number of equal rows. float32 may part a row at a tie (the tests check the margin), but not several rows."""
    pairs = zip(ours, theirs, strict=True)
    same = sum((a.token_ids, a.written_by_teacher) == (b.token_ids, b.written_by_teacher) for a, b in pairs)
    if same < len(ours) - max(1, len(ours) // 8):
        raise SystemExit(f"only {same} of {len(ours)} rows equal the reference engine's: a bug, not rounding")
    return same


def against_generate(name: str, pair: ModelPair, rows: int, sampling: Sampling, repeats: int) -> tuple[str, ...]:
    """The student alone against transformers' generate, per written token, with texts that end by themselves."""
    prompts = prompts_for(pair, 3 * rows)
    engine = SpeculativeEngine(ModelPair(pair.student, tokenizer=pair.tokenizer), max_rows=rows)
    written: dict[str, int] = {}

    def ours() -> None:
        written["ours"] = sum(len(each.token_ids) for each in engine.generate(prompts, Student(), sampling))

    def theirs() -> None:
        written["generate"] = 0
        for start in range(0, len(prompts), rows):
            ids, mask = left_padded(prompts[start : start + rows], pair.pad_id, pair.student.device)
            output = pair.student.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=sampling.max_new_tokens, eos_token_id=list(pair.eos_ids), pad_token_id=pair.pad_id,
            )  # fmt: skip
            ended = torch.isin(output[:, ids.shape[1] :], torch.tensor(pair.eos_ids)).int()
            written["generate"] += int((ended.cumsum(1) - ended == 0).sum())

    ours()
    theirs()
    torch.manual_seed(0)
    seconds = median_seconds({"generate": theirs, "ours": ours}, repeats)
    # Each side draws its own texts, and their lengths differ, so only the time per token compares.
    per_token = {side: seconds[side] / written[side] for side in seconds}
    ratio = per_token["generate"] / per_token["ours"]
    return (
        name,
        f"{len(prompts)}, {rows} at a time",
        f"{1e3 * per_token['generate']:.2f} ms",
        f"{1e3 * per_token['ours']:.2f} ms",
        f"{ratio:.2f}",
        f"{GENERATE_TARGET} {'reached' if ratio >= GENERATE_TARGET else 'missed'}",
    )


def price_of_the_teacher(
    name: str, pair: ModelPair, prompts: list[list[int]], policy: Policy, sampling: Sampling, repeats: int
) -> tuple[str, ...]:
    """Switch against the student alone, and against the student's text scored afterward in one teacher forward."""
    engine = SpeculativeEngine(pair, max_rows=len(prompts))

    def student() -> list[Rollout]:
        return engine.generate(prompts, Student(), sampling)

    def scored() -> None:
        texts = [[*rollout.prompt.token_ids, *rollout.token_ids] for rollout in student()]
        ids, mask = left_padded(texts, pair.pad_id, pair.teacher.device)
        with torch.no_grad():
            pair.teacher(input_ids=ids, attention_mask=mask, use_cache=False)

    def switch() -> list[Rollout]:
        return engine.generate(prompts, policy, sampling)

    share = teacher_share_of(switch())
    scored()
    seconds = median_seconds({"switch": switch, "student": student, "scored": scored}, repeats)
    to_student, to_scored = seconds["switch"] / seconds["student"], seconds["switch"] / seconds["scored"]
    return (
        name,
        str(len(prompts)),
        f"{share:.0%}",
        f"{seconds['student']:.2f} s",
        f"{seconds['scored']:.2f} s",
        f"{seconds['switch']:.2f} s",
        f"{to_student:.2f}",
        f"{to_scored:.2f}",
        f"{PRICE_TARGET} {'reached' if to_scored <= PRICE_TARGET else 'missed'}",
    )


def run(plan: dict[str, dict[int, tuple[float, ...]]], new_tokens: int, repeats: int, console: Console) -> list[Report]:
    """The three tables for the models of a plan."""
    engines = Report(
        f"Against the reference engine, {new_tokens} new tokens",
        (
            "pair", "cost ratio", "batch", "teacher share", "reference", "ours", "times faster", "target",
            "fewer teacher forwards", "kept of drafted", "same rows",
        ),
        [],
    )  # fmt: skip
    generate = Report(
        f"The student alone against transformers' generate, per written token, up to {new_tokens} new tokens",
        ("student of", "prompts", "generate", "ours", "times faster", "target"),
        [],
    )
    price = Report(
        f"What the teacher costs, {new_tokens} new tokens",
        (
            "pair", "batch", "teacher share", "student alone", "student, then scored", "switch", "switch / student",
            "switch / scored", "target",
        ),
        [],
    )  # fmt: skip
    sampling = Sampling(max_new_tokens=new_tokens)
    for name, batches in plan.items():
        with console.status(f"measuring {name}"):
            pair = load(name)
            prompts = prompts_for(pair, max(8, *batches))
            typical = sorted(batches)[len(batches) // 2]
            generate.rows.append(against_generate(name, with_ends(pair), typical, sampling, repeats))
            pair = without_ends(pair)
            shares = sorted({share for shares in batches.values() for share in shares} | {0.5})
            policies = {share: policy_with_share(pair, prompts[:8], share, sampling) for share in shares}
            for batch, wanted in batches.items():
                engines.rows += [
                    against_reference(name, pair, prompts[:batch], policies[share], share, sampling, repeats)
                    for share in wanted
                ]
            if name in PRICED:
                price.rows.append(price_of_the_teacher(name, pair, prompts[:typical], policies[0.5], sampling, repeats))
    return [engines, generate, price]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[DEMO, *RANDOM_PAIRS], help="default: all but quick")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes, with every teacher share")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the median counts")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, once: does it run?")
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    plan = QUICK if options.quick else {name: PLAN.get(name, {8: SHARES}) for name in options.models or PLAN}
    if options.batch:
        plan = {name: dict.fromkeys(options.batch, SHARES) for name in plan}
    console = Console(width=None if Console().is_terminal else 180)
    repeats, new_tokens = (1, 16) if options.quick else (options.repeats, 128)
    reports = run(plan, new_tokens, repeats, console)
    found = f"{conditions()}; median of {repeats}"
    for report in reports:
        console.print(report.table())
    console.print(found)
    if options.write:
        text = "\n\n".join(["## Rollouts", found + ".", *(report.markdown() for report in reports)])
        write_section(options.document, "rollout", text)
        console.print(f"written to {options.document}")


if __name__ == "__main__":
    main()
