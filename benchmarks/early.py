"""What a draft would save that stops where it may not stand: forwards, and what is kept of what is drafted.

    python benchmarks/early.py [--models demo 5M/40M world] [--shares 0.1 0.3 0.5] [--batch 8] [--write]

A draft of up to 12 tokens stops once a fraction of the rows want it to: by their own surprise, or by how far the models lay apart
before; or at the end of their text. Beside the rules: fixed blocks, and those that the engine chooses. The tokens are the same,
which is checked. `world` is the demo's pair on its own prompts, whose texts end; texts of the others go on to the last token.
The engine has no such rule: see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from pairs import DEMO, load, prompts_for, without_ends
from rollout import DOCUMENT, Report, policy_with_share
from switchkd.distributions.draw import Draft
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout import speculative
from switchkd.rollout.block import State
from switchkd.rollout.log import RolloutLog
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.rollout.writer import BlockWriter
from timing import THREADS, conditions, write_section

WORLD = "world"
NEW_TOKENS = {DEMO: 96, WORLD: 224}
SHARES = (0.1, 0.3, 0.5)
LONGEST = 12


@dataclass(frozen=True)
class Rule(ABC):
    """When a draft stops: once `fraction` of the rows have wanted it to. `cut` is in the rule's unit."""

    cut: float
    fraction: float
    unit: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of rows at {self.cut:g} {self.unit}"

    @abstractmethod
    def stops(self, draft: Draft, logs: Sequence[RolloutLog]) -> Tensor:
        """Where each row wants to stop, (B, K)."""


class Surprise(Rule):
    """A row wants to stop at a token of more than `cut` nats, -log p of the student."""

    unit = "nats"

    def stops(self, draft: Draft, logs: Sequence[RolloutLog]) -> Tensor:
        """Where each row wants to stop, (B, K)."""
        return -draft.student_logp.gather(-1, draft.proposal[..., None])[..., 0] > self.cut


class Apart(Rule):
    """A row wants to stop at its second token if the mean divergence of its last 4 was above `cut` thresholds."""

    unit = "thresholds"

    def stops(self, draft: Draft, logs: Sequence[RolloutLog]) -> Tensor:
        """Where each row wants to stop, (B, K)."""
        apart = [bool(log.token_ids) and fmean(log.divergence[-4:]) > self.cut * log.threshold[-1] for log in logs]
        return torch.tensor(apart)[:, None] & (torch.arange(draft.proposal.shape[1]) > 0)


RULES: list[Rule] = [Surprise(cut, fraction) for cut in (0.5, 1.5, 3.0) for fraction in (0.3, 0.7)]
RULES += [Apart(cut, fraction) for cut in (0.5, 1.0) for fraction in (0.3, 0.7)]


class _StoppingWriter(BlockWriter):
    """Drafts by a rule. `drafted` counts tokens; the engine counts whole blocks."""

    rule: Rule
    eos_ids: Tensor
    drafted = 0

    def _draft(self, size: int, state: State, longest: int, logs: Sequence[RolloutLog]) -> Draft:
        # Drafted in full and cut where the rule stops it: the tokens are the same, and only the forwards up to there count.
        draft = super()._draft(size, state, longest, logs)
        stops = self.rule.stops(draft, logs) | torch.isin(draft.proposal, self.eos_ids)
        over = stops.cummax(dim=1).values.float().mean(dim=0) >= self.rule.fraction
        kept = int(over.float().argmax()) + 1 if bool(over.any()) else size
        self.metrics.forwards["student"] -= size - kept
        type(self).drafted += kept * len(logs)
        return Draft(
            draft.proposal[:, :kept], draft.student_logp[:, :kept], draft.address.at((slice(None), slice(0, kept)))
        )


def writes(rule: Rule, eos_ids: Tensor) -> type[_StoppingWriter]:
    """The writer by that rule."""
    return type("_Stopping", (_StoppingWriter,), {"rule": rule, "eos_ids": eos_ids, "drafted": 0})


def run(names: Sequence[str], shares: Sequence[float], batch: int) -> Report:
    """The table."""
    report = Report(
        f"Drafts that stop early, batch {batch}",
        ("pair", "teacher share", "draft", "kept of drafted", "student's forwards", "teacher's forwards", "time of forwards"),
        [],
    )  # fmt: skip
    for name in names:
        pair = load(DEMO if name == WORLD else name)
        prompts, sampling = prompts_for(pair, batch), Sampling(max_new_tokens=NEW_TOKENS.get(name, 48))
        pair = pair if name == WORLD else without_ends(pair)
        for share in shares:
            report.rows += _rows(name, pair, prompts, share, sampling)
            print(*report.rows[-len(RULES) - 5 :], sep="\n", flush=True)
    return report


def _rows(
    name: str, pair: ModelPair, prompts: list[list[int]], share: float, sampling: Sampling
) -> list[tuple[str, ...]]:
    policy = policy_with_share(pair, prompts[:8], share, sampling)
    eos_ids = torch.tensor(pair.eos_ids, dtype=torch.long)
    sides: dict[str, tuple[int | str, Rule | None]] = {f"{size} tokens": (size, None) for size in (4, 2, 8, LONGEST)}
    sides["auto"] = ("auto", None)
    sides |= {f"to {LONGEST}, {rule}": (LONGEST, rule) for rule in RULES}
    rows, texts, costs = [], None, (1.0, 1.0)
    for side, (size, rule) in sides.items():
        engine = SpeculativeEngine(pair, size, len(prompts))
        writer = writes(rule, eos_ids) if rule else BlockWriter
        with patch.object(speculative, "BlockWriter", writer):
            rollouts = engine.generate(prompts, policy, sampling)
        written = [rollout.token_ids for rollout in rollouts]
        if texts is None:
            # The first side's forwards are taken for all: those of a stopped draft are not made here, only counted.
            costs = tuple(
                engine.metrics.seconds[role] / engine.metrics.forwards[role] for role in ("student", "teacher")
            )
        texts = texts or written
        if sum(map(str.__eq__, map(str, texts), map(str, written))) < len(texts) - 1:
            raise SystemExit(f"{side} of {name} wrote other tokens")
        forwards = engine.metrics.forwards["student"], engine.metrics.forwards["teacher"]
        seconds = sum(count * cost for count, cost in zip(forwards, costs, strict=True))
        teachers = [by_teacher for rollout in rollouts for by_teacher in rollout.written_by_teacher]
        kept = len(teachers) / (writer.drafted if issubclass(writer, _StoppingWriter) else engine.metrics.drafted)
        rows.append(
            (name, f"{sum(teachers) / len(teachers):.0%}", side, f"{kept:.2f}", *map(str, forwards), f"{seconds:.2f} s")
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[WORLD, DEMO, "5M/40M"])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    report = run(options.models, options.shares, options.batch)
    Console(width=160).print(report.table(), conditions())
    if options.write:
        write_section(DOCUMENT, "early", f"{conditions()}\n\n{report.markdown()}")


if __name__ == "__main__":
    main()
