"""Runs as they are on the disk, made up: what a report is made of."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><!--<script><img src=x onerror=alert(1)>\u2028\u202e"


def rollout_line(*, tokens: int = 6, seed: int = 0, words: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """A line of rollouts.jsonl, its numbers drawn at random."""
    rng = random.Random(seed)
    words = words or [f" w{number}" for number in range(200)]
    texts = [rng.choice(words) for _ in range(tokens)]
    divergence = [min(0.69, rng.expovariate(8)) for _ in range(tokens)]
    threshold = [0.3 * math.exp(-0.05 * position) for position in range(tokens)]
    by_teacher = [d > t for d, t in zip(divergence, threshold, strict=True)]

    def favorites() -> dict[str, Any]:
        rows = [sorted((rng.random() ** 3 for _ in range(5)), reverse=True) for _ in texts]
        logp = [[math.log(max(each / sum(row), 1e-9)) for each in row] for row in rows]
        alternatives = [[text, *rng.choices(words, k=4)] for text in texts]
        return {"token_ids": [[0] * 5] * tokens, "texts": alternatives, "logp": logp}

    return {
        "stage": "",
        "step": 1,
        "followed": False,
        "prompt_id": 0,
        "sample_id": 0,
        "prompt": "Say what comes next.\n",
        "response": "".join(texts),
        "finish_reason": "end_of_text",
        "teacher_share": sum(by_teacher) / tokens,
        "tokens": texts,
        "texts": texts,
        "written_by_teacher": by_teacher,
        "divergence": divergence,
        "threshold": threshold,
        "student_logp": [math.log(rng.uniform(0.01, 1)) for _ in texts],
        "teacher_logp": [math.log(rng.uniform(0.01, 1)) for _ in texts],
        "student_favorites": favorites(),
        "teacher_favorites": favorites(),
        **changes,
    }


def log_events(steps: int, stage: str = "") -> list[dict[str, Any]]:
    """Log events of a run whose loss and share fall."""
    events: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        events.append(
            {
                "stage": stage,
                "step": step,
                "seconds": step,
                "loss": 1 / step,
                "teacher_share": 0.5 / step,
                "response_tokens": 20.0 + step,
                "ended": 0.9,
                "rollout_tokens_per_second": 900.0 + step,
                "train_tokens_per_second": 400.0,
                "divergence/0-31": 0.2 / step,
                "divergence/32-63": 0.3 / step,
            }
        )
    return events


def write_report_run(
    folder: Path, rollouts: Sequence[dict[str, Any]] = (), *, steps: int = 12, stage: str = "", **settings: Any
) -> Path:
    """A run's folder without a model, and an evaluation of it."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"student": "world:student", "teacher": "world:teacher", "method": "switch", "threshold": 0.3, **settings}
    lines = [f"{key}: {json.dumps(value)}" for key, value in chosen.items()]
    mark = "# Not set, but in force: the defaults of transformers.TrainingArguments."
    (folder / "run.yaml").write_text("\n".join([*lines, "", mark, "weight_decay: 0.0", ""]))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.9", "git_commit": None}))
    write_json_lines(
        folder / "log.jsonl", [*log_events(steps, stage), {"stage": stage, "step": steps, "eval_loss": 0.4}]
    )
    write_json_lines(folder / "rollouts.jsonl", rollouts)
    scores = {"rouge_l": 31.25, "exact_match": 12.5, "response_tokens": 20.0, "ended_share": 0.9}
    overall = {"rows": 8, "mean": scores, "deviation": {**scores, "rouge_l": 0.5}, "per_seed": {}}
    (folder / "eval").mkdir(exist_ok=True)
    evaluation = {"model": str(folder), "sets": {"world:test": {"overall": overall, "by_bucket": {"copy": overall}}}}
    (folder / "eval" / "eval.json").write_text(json.dumps(evaluation))
    return folder


def write_json_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
