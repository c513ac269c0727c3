"""What a study measures of a model: its answers to each set, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.evaluation.score import answers_file, evaluate
from switchkd.models.chat import set_template
from switchkd.models.load import load_pair, load_tokenizer
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.file import RunConfig
from switchkd.study.file import StudyEvaluation
from switchkd.study.plan import StudyRun


def measure(row: StudyRun, run: RunConfig, model: str, answers: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's results on each set: those of each row, and their means."""
    config, given = run.config(), {**row.evaluation, "seeds": tuple(row.evaluation["seeds"])}
    evaluation = StudyEvaluation(**given)
    # What a run leaves is loaded as it is.
    how: dict[str, dict[str, Any]] = {
        "start": {
            "student_drop_layers": run.student_drop_layers,
            "student_quantization": run.student_quantization,
            "model_init_kwargs": config.model_init_kwargs,
        },
        "teacher": {
            "student_quantization": run.teacher_quantization,
            "model_init_kwargs": config.teacher_model_init_kwargs,
        },
    }
    pair = load_pair(
        model,
        None,
        placement=config.placement,
        trust_remote_code=run.trust_remote_code,
        **how.get(row.kind, {}),
    )
    assert pair.tokenizer is not None
    if row.kind == "start" and run.teacher not in (None, "self"):
        teacher_tokenizer = load_tokenizer(str(run.teacher), trust_remote_code=run.trust_remote_code)
        set_template(pair.tokenizer, teacher_tokenizer, config.template_from)
    settings = evaluation.settings(config)
    pair.check_room(settings.max_prompt_tokens + settings.sampling.max_new_tokens)
    found = evaluate(
        SpeculativeEngine(pair, config.block_size, max_rows=config.rollout_rows, compile=config.compile),
        pair.tokenizer,
        {name: resolve(name, "eval", data_dir=run.data_dir, limit=evaluation.limit) for name in evaluation.sets},
        model_name=row.name,
        settings=settings,
        out_folder=answers,
    )
    scores = {}
    for name, result in found.sets.items():
        parts = {"all": result.overall, **result.by_bucket}
        scores[name] = {part: {"rows": each.rows, **each.mean.flat()} for part, each in parts.items()}
    return {name: _by_row(answers_file(answers, name)) for name in evaluation.sets}, scores


def _by_row(path: Path) -> dict[str, Any]:
    """What an interval over rows needs: for each seed of the sampling, each row's exact match, 0 or 1, and ROUGE-L, 0 to 100.

    And each row's id, and the number of its bucket among `buckets`, where rows have one.
    """
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["exact_match"] is None:
            raise UserError(f"{answer['where']} has no reference; a study compares with references, leave the set out")
        by_seed.setdefault(answer["seed"], []).append(answer)
    first = next(iter(by_seed.values()))
    buckets = list(dict.fromkeys(answer["bucket"] for answer in first))
    return {
        "rows": [answer["prompt_id"] for answer in first],
        "buckets": buckets,
        "bucket_of": [buckets.index(answer["bucket"]) for answer in first],
        "exact_match": ["".join(str(int(each["exact_match"])) for each in answers) for answers in by_seed.values()],
        "rouge_l": [[round(each["rouge_l"], 2) for each in answers] for answers in by_seed.values()],
    }
