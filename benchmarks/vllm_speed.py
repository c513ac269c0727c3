"""Tokens a second of our engine, of vLLM with our rule, and of transformers' generate, in one run.

    python benchmarks/vllm_speed.py [--models 5M/40M SmolLM2] [--batch 1 8 32] [--repeats 3] [--write]

In the environment of `make test-vllm`. The sides take turns; texts never end, so that every row writes the same number of tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pairs import load, prompts_for, without_ends
from rollout import DOCUMENT, Report, policy_with_share
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling, teacher_share_of
from switchkd.rollout.law import Student
from switchkd.rollout.reference import left_padded
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.serving.colocated import VllmOptions
from switchkd.serving.engine import VllmEngine
from timing import THREADS, conditions, median_seconds, write_section

SHARES = (0.1, 0.5)
SHOWN = ("pair", "batch", "teacher's share", "ours", "vLLM", "generate, student alone", "equal rows")


def generated(pair: ModelPair, prompts: list[list[int]], sampling: Sampling) -> None:
    """The student alone, by transformers."""
    ids, mask = left_padded(prompts, pair.pad_id, pair.student.device)
    pair.student.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.max_new_tokens, pad_token_id=pair.pad_id,
    )  # fmt: skip


def keep(kept: dict[str, list[Rollout]], side: str, run: Callable[[], list[Rollout]]) -> None:
    """Run a side and keep its rollouts."""
    kept[side] = run()


def measured(name: str, batches: Sequence[int], new_tokens: int, repeats: int) -> list[tuple[str, ...]]:
    """The table's rows of one pair."""
    pair = without_ends(load(name))
    sampling, found = Sampling(max_new_tokens=new_tokens), []
    options = VllmOptions(max_rows=max(batches), max_tokens=64 + new_tokens, cache_gib=2.0)
    vllm, prompts = VllmEngine(pair, options=options), prompts_for(pair, max(batches))
    for share in SHARES:
        policy = policy_with_share(pair, prompts[:8], share, sampling)
        for batch in batches:
            ours, some = SpeculativeEngine(pair, max_rows=batch), prompts[:batch]
            kept: dict[str, list[Rollout]] = {}

            sides: dict[str, Callable[[], object]] = {
                "ours": partial(keep, kept, "ours", partial(ours.generate, some, policy, sampling)),
                "vllm": partial(keep, kept, "vllm", partial(vllm.generate, some, policy, sampling)),
                "generate": partial(generated, pair, some, sampling),
            }
            for warm in (ours, vllm):
                warm.generate(some, Student(), Sampling(max_new_tokens=4))
            seconds = median_seconds(sides, repeats)
            speed = [f"{batch * new_tokens / seconds[side]:.0f}" for side in sides]
            same = sum(a.token_ids == b.token_ids for a, b in zip(kept["ours"], kept["vllm"], strict=True))
            row = (name, str(batch), f"{teacher_share_of(kept['ours']):.0%}", *speed, f"{same}/{batch}")
            print(*row, flush=True)
            found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["5M/40M"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--note", default="", help="said beside the conditions, such as that the machine was shared")
    parser.add_argument("--write", action="store_true", help="update the section in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [row for name in options.models for row in measured(name, options.batch, options.tokens, options.repeats)]
    report = Report("Tokens a second", SHOWN, rows)
    Console(width=160).print(report.table())
    if options.write:
        said = f"{options.tokens} tokens a row, median of {options.repeats}; {conditions()}. {options.note}".strip()
        write_section(options.document, "vllm", "\n\n".join(["## Rollouts by vLLM", said, report.markdown()]))


if __name__ == "__main__":
    main()
