"""One run of each method on the embedded pair: exact match by length, and what it cost.

Single runs: differences of a few points are chance.

    python scripts/family.py --out family.csv [--methods switch trb ...] [--steps 200] [--rows 300] [--seed 10]
    python scripts/family.py --laws

A row is added to the CSV file when its run has ended; runs that stand in it are not repeated. `--table` prints it as Markdown.
`--laws` rolls out 64 prompts under each law, with the student as it ships, and prints what that took.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from switchkd import (
    AdaSwitch,
    Early,
    Interleave,
    Late,
    Mix,
    Policy,
    SpeculativeEngine,
    Student,
    Switch,
    SwitchConfig,
    SwitchTrainer,
    Teacher,
    TrustRegionBlend,
    load_pair,
)
from switchkd.data.sets import resolve
from switchkd.evaluation.score import EvaluationSettings, evaluate
from switchkd.models.heads import backbone
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling
from switchkd.training.dataset import tokenized

MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 224, 288
# Settings beside the method's own. The embedded teacher knows seven tasks and follows no instructions, so TRD can only show it the
# attempt in front of the prompt.
RUNS: dict[str, dict[str, Any]] = {
    "start": {},
    "kd": {"method": "kd"},
    "on-policy, forward KL": {"method": "imitkd"},
    "on-policy, reverse KL": {"method": "imitkd", "divergence": "reverse_kl"},
    "switch": {"method": "switch", "threshold": 0.02},
    "switch, reverse KL": {"method": "switch", "threshold": 0.02, "divergence": "reverse_kl"},
    "random": {"method": "random", "policy": {"teacher_share": 0.1}},
    "skd": {"method": "skd", "policy": {"keep_top_k": 2}},
    "adaswitch": {"method": "adaswitch"},
    "trb": {"method": "trb"},
    "trb, constant budget": {"method": "trb", "policy": {"anneal_steps": 0}},
    "iw_opd": {"method": "iw_opd"},
    "prefix": {"method": "prefix"},
    "tropd": {"method": "tropd"},
    "release": {"method": "release"},
    "trd": {"method": "trd", "rewrite": {"template": "{attempt}\n{prompt}\n"}},
    "stable_opd": {"method": "stable_opd"},
    "reopd": {"method": "reopd"},
    "extrapolated": {"method": "imitkd", "divergence": "reverse_kl", "target": "extrapolated"},
    "proximal": {"method": "imitkd", "divergence": "reverse_kl", "target": "proximal"},
    "growth": {
        "method": "imitkd",
        "divergence": "reverse_kl",
        "length_growth": {"start": 24, "steps_per_token": 1.0},
    },
}
COLUMNS = (
    "run", "seed", "steps", "all", "short", "medium", "long", "teacher_share", "rollout_tokens", "acceptance",
    "student_forwards", "teacher_forwards", "seconds",
)  # fmt: skip


class CountingEngine:
    """A SpeculativeEngine that adds up what its calls did."""

    def __init__(self, pair: ModelPair, margin_top_k: int) -> None:
        self.inner = SpeculativeEngine(pair, block_size=4, max_rows=32, margin_top_k=margin_top_k)
        self.tokens = self.drafted = self.student_forwards = 0
        self.by_teacher = 0.0

    def generate(self, *args: Any, **kwargs: Any) -> list[Rollout]:
        """As the engine's."""
        rollouts = self.inner.generate(*args, **kwargs)
        metrics = self.inner.metrics
        self.tokens += metrics.tokens
        self.drafted += metrics.drafted
        self.student_forwards += metrics.student_forwards
        self.by_teacher += sum(rollout.teacher_tokens for rollout in rollouts)
        return rollouts


def exact_matches(pair: ModelPair, rows: int) -> dict[str, float]:
    """Exact match in percent, over all test rows and by length."""
    assert pair.tokenizer is not None
    found = evaluate(
        SpeculativeEngine(ModelPair(pair.student, None, pair.tokenizer)),
        pair.tokenizer,
        {"world:test": resolve("world:test", limit=rows)},
        model_name="student",
        settings=EvaluationSettings(Sampling(MAX_NEW_TOKENS, temperature=0), (0,), MAX_PROMPT_TOKENS),
        show_progress=False,
    )
    result = found.sets["world:test"]
    parts = {"all": result.overall, **result.by_bucket}
    return {part: round(summary.mean.exact_match, 1) for part, summary in parts.items()}


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one run and measure it."""
    pair = load_pair("world:student", "world:teacher")
    row: dict[str, Any] = {"run": name, "seed": args.seed, "steps": args.steps}
    if settings := RUNS[name]:
        assert pair.teacher is not None
        assert pair.tokenizer is not None
        counted = [0]
        backbone(pair.teacher).register_forward_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
        with tempfile.TemporaryDirectory() as folder:
            config = SwitchConfig(
                output_dir=folder, max_steps=args.steps, per_device_train_batch_size=32, learning_rate=1e-3,
                lr_scheduler_type="cosine", warmup_steps=5, weight_decay=0.01, adam_beta2=0.95, seed=args.seed, use_cpu=True,
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                max_new_tokens=MAX_NEW_TOKENS, max_prompt_tokens=MAX_PROMPT_TOKENS, **settings,
            )  # fmt: skip
            engine = CountingEngine(pair, config.plan.objective.margin_top_k)
            examples = tokenized(resolve("world:train"), pair.tokenizer, config, need_response=True)
            trainer = SwitchTrainer(pair, args=config, train_dataset=examples, engine=engine)
            started = time.perf_counter()
            trainer.train()
        row["seconds"] = round(time.perf_counter() - started)
        row |= {"rollout_tokens": engine.tokens, "student_forwards": engine.student_forwards}
        row["teacher_forwards"] = counted[0]
        if engine.tokens:
            row["teacher_share"] = round(engine.by_teacher / engine.tokens, 3)
            row["acceptance"] = round(engine.tokens / engine.drafted, 3)
    return row | exact_matches(pair, args.rows)


LAWS: dict[str, Policy] = {
    "Student": Student(),
    "Teacher": Teacher(),
    "Switch, 0.02": Switch(threshold=0.02),
    "AdaSwitch": AdaSwitch(),
    "Early, 0.1": Early(0.1),
    "Late, 0.1": Late(0.1),
    "Mix, 0.1": Mix(0.1),
    "Interleave, top 1": Interleave(1),
    "Interleave, top 2": Interleave(2),
    "TrustRegionBlend, 0.02 nats": TrustRegionBlend(0.02),
    "TrustRegionBlend, 0.2 nats": TrustRegionBlend(0.2),
}


def laws() -> None:
    """Print a table of what each law costs on the pair as it ships. The teacher scores every text, the student's too."""
    pair = load_pair("world:student", "world:teacher")
    assert pair.tokenizer is not None
    config = SwitchConfig(output_dir="unused", max_new_tokens=MAX_NEW_TOKENS, max_prompt_tokens=MAX_PROMPT_TOKENS)
    prompts = [
        each.prompt for each in tokenized(resolve("world:test", limit=64), pair.tokenizer, config, need_response=False)
    ]
    engine = SpeculativeEngine(pair, block_size=4, max_rows=32)
    print("| law | teacher's part | tokens | kept of drafted | student forwards | teacher forwards |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, policy in LAWS.items():
        rollouts = engine.generate(prompts, policy, Sampling(MAX_NEW_TOKENS), seed=0, keep_teacher="hidden")
        done = engine.metrics
        share = sum(rollout.teacher_tokens for rollout in rollouts) / done.tokens
        counts = f"{done.student_forwards} | {done.teacher_forwards}"
        print(f"| {name} | {share:.1%} | {done.tokens} | {done.acceptance:.1%} | {counts} |")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("family.csv"))
    parser.add_argument("--laws", action="store_true", help="the table of the laws, and nothing else")
    parser.add_argument("--methods", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print the file as Markdown and do nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if args.laws:
        laws()
        return
    done = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    if args.table:
        for cells in (COLUMNS, ["---"] * len(COLUMNS), *([row[key] for key in COLUMNS] for row in done)):
            print(f"| {' | '.join(cells)} |")
        return
    known = {(row["run"], row["seed"], row["steps"]) for row in done}
    for name in args.methods:
        if (name, str(args.seed), str(args.steps)) in known:
            continue
        row = run(name, args)
        print(row, flush=True)
        is_new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
