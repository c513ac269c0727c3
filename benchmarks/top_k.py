"""How far the loss on the teacher's likeliest ids is from the loss on its whole distributions, and the gradient likewise.

    python benchmarks/top_k.py [--models demo SmolLM2] [--write] [--quick]

Text of the student, on the pair's own prompts, at temperature 1. The gradient is that of the student's hidden states.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pairs import DEMO, SMOLLM, load, prompts_for
from rollout import DOCUMENT, Report
from switchkd.data.collate import collate
from switchkd.distributions.divergences import DIVERGENCES
from switchkd.distributions.shaping import top_logp
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher, TeacherSignal, TopKTeacher
from switchkd.loss.states import response_states
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout.law import Student
from switchkd.rollout.speculative import SpeculativeEngine
from timing import THREADS, conditions, write_section

KEPT = (8, 64, 512)
NAMES = ("forward_kl", "reverse_kl", "jensen_shannon")
SHOWN = ("pair", "ids", "k", "divergence", "loss, whole", "loss, top k", "gradient's error", "mass of the rest")


def states(pair: ModelPair, rows: int, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """The student's and the teacher's hidden states (N, H) at the response tokens of the student's text, and the tokens (N,)."""
    rollouts = SpeculativeEngine(pair).generate(prompts_for(pair, rows), Student(), sampling)
    batch = collate(rollouts, pair.pad_id)
    found = []
    for model in (pair.student, pair.teacher):
        by_row = dict(response_states(model, rollouts, pad_id=pair.pad_id, rows=8))
        found.append(torch.cat([by_row[row] for row in range(len(rollouts))]))
    return found[0], found[1], batch.input_ids_BT[batch.response_mask_BT]


def loss_and_gradient(pair: ModelPair, counted: Counted, name: str, teacher: TeacherSignal) -> tuple[float, Tensor]:
    """The mean loss over the positions in nats, and its gradient (N, H)."""
    hidden = counted.hidden_NH.detach().requires_grad_(True)
    objective = Objective(DIVERGENCES[name]())
    at = Counted(hidden, counted.token_ids_N)
    loss, _ = distillation_loss(at, pair.student_head, objective, teacher=teacher, denominator=float(len(hidden)))
    loss.backward()
    return float(loss.detach()), hidden.grad


def measured(name: str, rows: int, new_tokens: int) -> list[tuple[str, ...]]:
    """The table's rows of one pair."""
    pair = load(name)
    for parameter in pair.student.parameters():
        parameter.requires_grad_(False)
    student_NH, teacher_NH, tokens = states(pair, rows, Sampling(max_new_tokens=new_tokens))
    counted, found = Counted(student_NH, tokens), []
    with torch.no_grad():
        logits = pair.teacher_head(teacher_NH)
    for divergence in NAMES:
        whole, gradient = loss_and_gradient(pair, counted, divergence, DenseTeacher(teacher_NH, pair.teacher_head))
        for top_k in (k for k in KEPT if k < pair.vocabulary_size):
            top = top_logp(logits, top_k)
            signal = TopKTeacher(top.ids, top.logp, 1.0, top.rest_logp)
            loss, other = loss_and_gradient(pair, counted, divergence, signal)
            error = float((other - gradient).norm() / gradient.norm())
            rest = float(top.rest_logp.exp().mean())
            cells = (f"{whole:.4f}", f"{loss:.4f} ({loss / whole - 1:+.2%})", f"{error:.2%}", f"{rest:.2%}")
            found.append((name, f"{pair.vocabulary_size:,}", str(top_k), divergence, *cells))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[DEMO, SMOLLM])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a tiny pair, a few tokens: does it run?")
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    names, size = (["quick"], (4, 8)) if options.quick else (options.models, (options.texts, options.tokens))
    report = Report("The loss on likeliest ids", SHOWN, [row for name in names for row in measured(name, *size)])
    console = Console(width=None if Console().is_terminal else 180)
    console.print(report.table())
    if options.write:
        said = f"{size[0]} texts of up to {size[1]} tokens; {conditions()}."
        text = "\n\n".join(["## The teacher's likeliest ids", said, report.markdown()])
        write_section(options.document, "top_k", text)


if __name__ == "__main__":
    main()
