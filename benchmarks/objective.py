"""Memory and time of the objective's value and gradients, against the dense computation and TRL's.

    python benchmarks/objective.py [--cases reverse_kl jensen_shannon] [--repeats 5] [--write] [--quick]

All sides get the same hidden states and head weights. Times are a median over turns in one process, for the first case alone.
Memory is how far the resident set of a separate process rises above its inputs. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from rollout import DOCUMENT, Report
from switchkd.distributions.divergences import DIVERGENCES
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher
from switchkd.models.heads import Head
from timing import THREADS, TRL_MISSING, conditions, has_trl, median_seconds, write_section

OURS, DENSE, TRL = "ours", "dense", "TRL"
# TRL's beta of the same divergence.
BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jensen_shannon": 0.5}
# What we aim at, at most, as a share of the dense computation's memory, of TRL's memory and of TRL's time.
DENSE_MEMORY_TARGET, TRL_MEMORY_TARGET, TRL_TIME_TARGET = 0.1, 1.0, 1.1
# Largest relative difference of the value and of the gradients' norms, in float32. The dense side's log_softmax, as people
# write it, adds up the vocabulary one by one on a CPU: 1.6e-5 from float64 at 131,072 ids, where ours and TRL's are 2e-6.
TOLERANCES = {DENSE: 5e-5, TRL: 1e-5}
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A divergence, with a student's head that trains or, as under LoRA, does not."""

    divergence: str
    head_trains: bool = True

    @property
    def head(self) -> str:
        """Whether the head trains, in a word."""
        return "trains" if self.head_trains else "frozen"


CASES = {
    "reverse_kl": Case("reverse_kl"),
    "jensen_shannon": Case("jensen_shannon"),
    "reverse_kl-frozen": Case("reverse_kl", head_trains=False),
}


@dataclass(frozen=True)
class Size:
    """Numbers of positions, of hidden units (in both models) and of ids."""

    positions: int
    hidden: int
    vocabulary: int


FULL, QUICK = Size(2048, 1024, 131_072), Size(32, 16, 512)


class Inputs:
    """Hidden states and head weights of a student and of a teacher not far from it, the same at every call."""

    def __init__(self, size: Size, *, head_trains: bool = True) -> None:
        torch.manual_seed(0)
        self.student_hidden_NH = torch.randn(size.positions, size.hidden).requires_grad_()
        self.teacher_hidden_NH = self.student_hidden_NH.detach() + 0.3 * torch.randn(size.positions, size.hidden)
        self.student, self.teacher = (nn.Linear(size.hidden, size.vocabulary, bias=False) for _ in range(2))
        with torch.no_grad():
            # Logits with a standard deviation of about 3, as trained models have.
            self.student.weight.normal_(std=3 / size.hidden**0.5)
            self.teacher.weight.normal_(std=0.3 * 3 / size.hidden**0.5).add_(self.student.weight)
        self.student.requires_grad_(head_trains)
        self.teacher.requires_grad_(False)

    def gradients(self) -> list[Tensor]:
        """The gradients of hidden states and weight."""
        return [tensor.grad for tensor in (self.student_hidden_NH, self.student.weight) if tensor.grad is not None]

    def clear(self) -> None:
        """Drop the gradients."""
        self.student_hidden_NH.grad = self.student.weight.grad = None


def ours(inputs: Inputs, divergence: str) -> Tensor:
    student, teacher = (
        Head(projection, projection.out_features, lambda logits: logits)
        for projection in (inputs.student, inputs.teacher)
    )
    positions = len(inputs.student_hidden_NH)
    return distillation_loss(
        Counted(inputs.student_hidden_NH, torch.zeros(positions, dtype=torch.long)),
        student,
        Objective(DIVERGENCES[divergence]()),
        teacher=DenseTeacher(inputs.teacher_hidden_NH, teacher),
        denominator=positions,
    )[0]


def dense(inputs: Inputs, divergence: str) -> Tensor:
    student_logp = torch.log_softmax(inputs.student(inputs.student_hidden_NH), dim=-1)
    teacher_logp = torch.log_softmax(inputs.teacher(inputs.teacher_hidden_NH), dim=-1)
    # Written out: our own divergences, which are safe at excluded ids, would take more memory here.
    if divergence == "reverse_kl":
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(dim=-1).mean()
    if divergence == "forward_kl":
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(dim=-1).mean()
    mixture_logp = torch.logaddexp(student_logp, teacher_logp) - torch.log(torch.tensor(2.0))
    of_student = student_logp.exp() * (student_logp - mixture_logp)
    return ((of_student + teacher_logp.exp() * (teacher_logp - mixture_logp)) / 2).sum(dim=-1).mean()


def trls(inputs: Inputs, divergence: str) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    positions = len(inputs.student_hidden_NH)
    loss: Tensor = _chunked_divergence_loss(
        inputs.student_hidden_NH[None],
        inputs.teacher_hidden_NH[None],
        inputs.student.weight,
        inputs.teacher.weight,
        torch.ones(1, positions),
        BETA[divergence],
        num_items_in_batch=positions,
    )[0]
    return loss


SIDES: dict[str, Callable[[Inputs, str], Tensor]] = {OURS: ours, DENSE: dense, TRL: trls}


def value_and_gradients(side: str, inputs: Inputs, divergence: str) -> float:
    """The value; the gradients are left in the inputs."""
    inputs.clear()
    loss = SIDES[side](inputs, divergence)
    loss.backward()
    return loss.item()


def peak_memory(side: str, case: Case, size: Size) -> int:
    """Bytes of memory that one pass adds to this process. A pass on small inputs goes first and is not counted."""
    value_and_gradients(side, Inputs(QUICK, head_trains=case.head_trains), case.divergence)
    inputs = Inputs(size, head_trains=case.head_trains)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    value_and_gradients(side, inputs, case.divergence)
    return max(1, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory can be measured on Linux only")


def peak_memory_elsewhere(side: str, case: Case, size: Size) -> int:
    """`peak_memory` in a fresh process."""
    task = json.dumps({"side": side, "case": asdict(case), "size": asdict(size)})
    command = [sys.executable, __file__, "--peak", task]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def furthest(inputs: Inputs, divergence: str, sides: Sequence[str]) -> dict[str, float]:
    """Each other side's largest relative difference from our value and gradients. Stop the benchmark above the tolerance."""
    value = value_and_gradients(OURS, inputs, divergence)
    gradients = inputs.gradients()
    furthest_of = {}
    for side in sides:
        if side == OURS:
            continue
        differences = [abs(value_and_gradients(side, inputs, divergence) / value - 1)]
        for theirs, own in zip(inputs.gradients(), gradients, strict=True):
            differences.append(float(theirs.sub_(own).norm() / own.norm()))
        furthest_of[side] = max(differences)
        if not furthest_of[side] <= TOLERANCES[side]:
            raise SystemExit(
                f"{side}'s value or gradients are {furthest_of[side]:.1e} from ours: not the same computation"
            )
    return furthest_of


def measure(case: Case, size: Size, sides: Sequence[str], repeats: int) -> list[tuple[str, ...]]:
    """A row for each side, without times if `repeats` is 0."""
    # One after another, and before this process grows: the dense side takes most of a machine's memory.
    memory = {side: peak_memory_elsewhere(side, case, size) for side in sides}
    inputs = Inputs(size, head_trains=case.head_trains)
    difference = furthest(inputs, case.divergence, sides)
    runs = {side: partial(value_and_gradients, side, inputs, case.divergence) for side in sides}
    seconds = median_seconds(runs, repeats) if repeats else None
    rows = []
    for side in sides:
        is_other = side != OURS
        of_memory = memory[OURS] / memory[side]
        of_time = None if seconds is None else seconds[OURS] / seconds[side]
        rows.append(
            (
                case.divergence,
                case.head,
                side,
                f"{memory[side] / MIB:,.0f} MiB",
                f"{of_memory:.3f}" if is_other else "",
                _verdict(of_memory, {DENSE: DENSE_MEMORY_TARGET, TRL: TRL_MEMORY_TARGET}.get(side)),
                "" if seconds is None else f"{seconds[side]:.2f} s",
                f"{of_time:.2f}" if is_other and of_time else "",
                _verdict(of_time, {TRL: TRL_TIME_TARGET}.get(side)),
                f"{difference[side]:.1e}" if is_other else "",
            )
        )
    return rows


def _verdict(ratio: float | None, target: float | None) -> str:
    return "" if target is None or ratio is None else f"{target} {'reached' if ratio <= target else 'missed'}"


def run(cases: Sequence[Case], size: Size, repeats: int, console: Console) -> Report:
    """The table of all cases."""
    sides = [OURS, DENSE, *([TRL] if has_trl() else [])]
    report = Report(
        f"{size.positions:,} positions, hidden size {size.hidden:,}, vocabulary {size.vocabulary:,}, float32",
        (
            "divergence", "head", "side", "memory", "ours / it", "target", "time", "ours / it", "target",
            "furthest from ours",
        ),
        [],
    )  # fmt: skip
    for index, case in enumerate(cases):
        with console.status(f"measuring {case}"):
            report.rows += measure(case, size, sides, 0 if index else repeats)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="only the first is timed")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side; the median counts")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, once: does it run?")
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    # How this file runs itself, to measure the memory of one side.
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    if options.peak:
        task = json.loads(options.peak)
        print(peak_memory(task["side"], Case(**task["case"]), Size(**task["size"])))
        return
    console = Console(width=None if Console().is_terminal else 180)
    size, repeats = (QUICK, 1) if options.quick else (FULL, options.repeats)
    report = run([CASES[name] for name in options.cases], size, repeats, console)
    found = f"{conditions()}; times: median of {repeats}, memory: one run"
    missing = [] if has_trl() else [TRL_MISSING]
    console.print(report.table(), found, *missing, sep="\n")
    if options.write:
        about = (
            "Value and gradients (of the student's hidden states and, where it trains, of its head's weight) of the training "
            "loss. Memory is what a process of its own adds to its inputs at its peak, the weight's gradient "
            f"({size.vocabulary * size.hidden * 4 / MIB:,.0f} MiB) included. `dense` makes all logits of both models; TRL's "
            "is the function that its DistillationTrainer calls."
        )
        write_section(
            options.document,
            "objective",
            "\n\n".join(["## The objective", found + ".", about, *missing, report.markdown()]),
        )
        console.print(f"written to {options.document}")


if __name__ == "__main__":
    main()
