"""What a whole optimizer step takes, rollouts included: ours against TRL's DistillationTrainer.

    python benchmarks/step.py [--models demo 5M/40M] [--batch 8 32] [--blocks 2] [--write] [--quick]

Each side trains its own copy of one student on the same prompts and response lengths: float32, AdamW, reverse KL. The sides
take turns in blocks of steps; the first two steps of a block do not count. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, Trainer, TrainerCallback

from pairs import DEMO, SMOLLM, cost_ratio, load, prompts_for, without_ends
from rollout import DOCUMENT, Report, policy_with_share
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Sampling
from switchkd.rollout.policies import Switch
from switchkd.training.trainer import SwitchTrainer
from timing import THREADS, TRL_MISSING, conditions, has_trl, write_section

TRL, ON_POLICY, SWITCH = "TRL", "ours, on-policy", "ours, SWITCH"
GRAPHS = ", compiled"
# Batch sizes by pair.
PLAN: dict[str, tuple[int, ...]] = {
    DEMO: (8, 32), "5M/40M": (8, 32), "10M/120M": (8, 32), "50k": (8,), "131k": (8,), SMOLLM: (8, 16)
}  # fmt: skip
# Shorter than 96 where a step is long.
NEW_TOKENS = {"quick": 8, "50k": 32, "131k": 32, SMOLLM: 32}
QUICK: dict[str, tuple[int, ...]] = {"quick": (4,)}
# The most that a step may take, as a multiple of TRL's time: by default, and by pair and batch.
TARGETS = {ON_POLICY: 0.8, SWITCH: 1.25}
OWN_TARGETS: dict[str, dict[int, float]] = {
    DEMO: {8: 1.2, 32: 0.95}, "5M/40M": {8: 1.9, 32: 0.95}, "10M/120M": {32: 0.95}, "50k": {8: 1.0}, "131k": {8: 1.0}
}  # fmt: skip
SHARE = 0.5
# So small that the student hardly changes: the shares and lengths of the first step are those of the last.
LEARNING_RATE = 1e-7
UNCOUNTED = 2


@dataclass
class Clock(TrainerCallback):
    """When steps ended and what was logged. A step lasts from the end of the previous one, so that nothing is left out."""

    begun: float = 0.0
    ends: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep what a step logged."""
        if "loss" in logs:
            self.logs.append(logs)

    def first(self) -> float:
        """The seconds of the first step, which compiles."""
        return self.ends[0] - self.begun

    def seconds(self) -> list[float]:
        """The seconds of each step that counts."""
        ends = self.ends[UNCOUNTED - 1 :]
        return [after - before for before, after in pairwise(ends)]


@dataclass(frozen=True)
class Task:
    """What each side is given."""

    pair: ModelPair
    prompts: list[list[int]]
    new_tokens: int
    steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of both trainers. A batch is all prompts, so that all steps have the same."""
        return {
            "per_device_train_batch_size": len(self.prompts),
            "max_steps": self.steps,
            "learning_rate": LEARNING_RATE,
            "optim": "adamw_torch",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
        }

    def student(self) -> PreTrainedModel:
        """A copy of the student that trains."""
        student = copy.deepcopy(self.pair.student).requires_grad_(True)
        # A name would bring its tokenizer, and with it an end of text.
        student.name_or_path = ""
        return student


@dataclass
class Measured:
    """One number for each step that counts."""

    seconds: list[float] = field(default_factory=list)
    generating: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    compiling: float = 0.0


def train_ours(task: Task, folder: str, measured: Measured, **settings: Any) -> None:
    """Add a block of our steps to `measured`."""
    clock = Clock()
    trainer = SwitchTrainer(
        model=task.student(),
        teacher_model=task.pair.teacher,
        args=SwitchConfig(
            output_dir=folder, max_new_tokens=task.new_tokens, divergence="reverse_kl", **settings, **task.settings
        ),
        train_dataset=[Example(Prompt(tuple(ids), index), ()) for index, ids in enumerate(task.prompts)],
        callbacks=[clock],
    )
    _train(trainer)
    measured.seconds += clock.seconds()
    measured.compiling = max(measured.compiling, clock.first() - median(clock.seconds()))
    for log in clock.logs[UNCOUNTED:]:
        tokens = log["response_tokens"] * len(task.prompts)
        measured.tokens.append(tokens)
        measured.generating.append(tokens / log["rollout_tokens_per_second"])
        measured.shares.append(log["teacher_share"])


def train_trl(task: Task, folder: str, measured: Measured) -> None:
    """Add a block of TRL's steps, with its own generation by transformers, to `measured`."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    clock, generating = Clock(), []
    trainer = DistillationTrainer(
        model=task.student(),
        teacher_model=task.pair.teacher,
        args=DistillationConfig(
            output_dir=folder, max_completion_length=task.new_tokens, beta=1.0, temperature=1.0, **task.settings
        ),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(word, ids)) for ids in task.prompts]}),
        processing_class=tokenizer_of_numbers(task.pair),
        callbacks=[clock],
    )
    generate = trainer._generate_single_turn

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        completions = generate(*arguments, **named)
        generating.append((time.perf_counter() - started, sum(map(len, completions))))
        return completions

    trainer._generate_single_turn = timed
    _train(trainer)
    measured.seconds += clock.seconds()
    for seconds, tokens in generating[UNCOUNTED:]:
        measured.generating.append(seconds)
        measured.tokens.append(tokens)
        measured.shares.append(0.0)


def _train(trainer: Trainer) -> None:
    trainer.remove_callback(
        next(each for each in trainer.callback_handler.callbacks if "Printer" in type(each).__name__)
    )
    trainer.train()


def word(number: int) -> str:
    """An id as text. No id's text holds another's: a tokenizer looks for the padding's inside of words as well."""
    return f"<{number}>"


def tokenizer_of_numbers(pair: ModelPair) -> Any:
    """A tokenizer whose text is the ids themselves, and whose end of text is an id that no model here can write."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word(number): number for number in range(pair.vocabulary_size)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<end>": pair.vocabulary_size}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>", pad_token=word(pair.pad_id)
    )


def sides_of(task: Task, policy: Switch, compiles: Sequence[bool]) -> dict[str, Callable[[str, Measured], None]]:
    """Each side of the comparison: adds a block of its steps to what is measured, in a folder."""
    methods: dict[str, dict[str, Any]] = {
        ON_POLICY: {"method": "gkd", "student_share": 1.0},
        SWITCH: {"method": "switch", "threshold": policy.threshold, "decay": "constant"},
    }
    return {
        side + (GRAPHS if compile else ""): partial(_train_ours_with, task, settings | {"compile": compile})
        for side, settings in methods.items()
        for compile in compiles
    }


def _train_ours_with(task: Task, settings: dict[str, Any], folder: str, measured: Measured) -> None:
    train_ours(task, folder, measured, **settings)


def measure(name: str, task: Task, policy: Switch, blocks: int, compiles: Sequence[bool]) -> list[tuple[str, ...]]:
    """The rows of the table, one a side."""
    batch, wanted = len(task.prompts), len(task.prompts) * task.new_tokens
    sides = sides_of(task, policy, compiles)
    if has_trl():
        sides = {TRL: lambda folder, measured: train_trl(task, folder, measured), **sides}
    results = {side: Measured() for side in sides}
    for _ in range(blocks):
        for side, train in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                train(folder, results[side])
    rows = []
    for side, measured in results.items():
        if any(tokens != wanted for tokens in measured.tokens):
            raise SystemExit(f"{side} trained on {measured.tokens} tokens a step, not on {wanted}")
        seconds, generating = median(measured.seconds), median(measured.generating)
        ratio = seconds / median(results[TRL].seconds) if TRL in results else None
        kind = side.removesuffix(GRAPHS)
        target = OWN_TARGETS.get(name, {}).get(batch) if kind == SWITCH else None
        target = target or TARGETS.get(kind)
        rows.append(
            (
                name,
                f"{cost_ratio(task.pair):.1f}",
                str(batch),
                side,
                f"{median(measured.shares):.0%}",
                f"{median(measured.tokens):,.0f}",
                f"{seconds:.2f} s",
                f"{generating:.2f} s",
                f"{seconds - generating:.2f} s",
                "" if ratio is None or target is None else f"{ratio:.2f}",
                "" if ratio is None or target is None else f"{target} {'reached' if ratio <= target else 'missed'}",
                f"{measured.compiling:.0f} s" if side.endswith(GRAPHS) else "",
            )
        )
    return rows


def run(
    plan: dict[str, tuple[int, ...]], blocks: int, counted: int, compiles: Sequence[bool], console: Console
) -> Report:
    """The table."""
    report = Report(
        "Reverse KL, float32",
        (
            "pair", "cost ratio", "batch", "side", "teacher share", "tokens a step", "step", "generation", "the rest",
            "ours / TRL", "target", "compiling",
        ),
        [],
    )  # fmt: skip
    for name, batches in plan.items():
        with console.status(f"measuring {name}"):
            pair = load(name)
            prompts, new_tokens = prompts_for(pair, max(8, *batches)), NEW_TOKENS.get(name, 96)
            pair = without_ends(pair)
            policy = policy_with_share(pair, prompts[:8], SHARE, Sampling(max_new_tokens=new_tokens))
            assert isinstance(policy, Switch)
            for batch in batches:
                task = Task(pair, prompts[:batch], new_tokens, steps=UNCOUNTED + counted)
                report.rows += measure(name, task, policy, blocks, compiles)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*PLAN, "quick"], help="default: all but quick")
    parser.add_argument("--compile", nargs="+", choices=["false", "true"], default=["false", "true"], help="our sides")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes")
    parser.add_argument("--blocks", type=int, default=2, help="turns of each side; three steps of each count")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, once: does it run?")
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    plan = QUICK if options.quick else {name: PLAN.get(name, (8,)) for name in options.models or PLAN}
    if options.batch:
        plan = dict.fromkeys(plan, tuple(options.batch))
    console = Console(width=None if Console().is_terminal else 180)
    blocks, counted, compiles = options.blocks, 3, [each == "true" for each in options.compile]
    if options.quick:
        blocks, counted, compiles = 1, 1, [False]
    report = run(plan, blocks, counted, compiles, console)
    found = f"{conditions()}; median of {blocks * counted}"
    missing = [] if has_trl() else [TRL_MISSING]
    console.print(report.table(), found, *missing, sep="\n")
    if options.write:
        about = (
            "A step is all of it: generation, the teacher, forward, backward, AdamW, logging. TRL's side is its "
            "DistillationTrainer with beta 1 and its generation by transformers, in float32 and without gradient "
            "checkpointing (its defaults are bfloat16 and with). Texts never end, so every side trains on the same number of "
            "tokens: 32 of a large vocabulary or real weights, else 96. The shares are those of the steps; compiling is the "
            "first step beyond the others."
        )
        write_section(
            options.document,
            # A part of the plan keeps to a section of its own.
            " ".join(["step", *(options.models or [])]),
            "\n\n".join(["## A training step", found + ".", about, *missing, report.markdown()]),
        )
        console.print(f"written to {options.document}")


if __name__ == "__main__":
    main()
