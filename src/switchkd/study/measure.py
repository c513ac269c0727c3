"""What a study measures of a model: its answers to each set, row by row, and its distance to the teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.analysis.distance import Distance, distance_to_teacher
from switchkd.data.examples import to_examples
from switchkd.data.rows import SourceRow
from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.evaluation.answers import answers_file
from switchkd.evaluation.score import EvaluationSettings, evaluate
from switchkd.models.chat import set_template
from switchkd.models.load import load_pair, load_tokenizer
from switchkd.models.pair import ModelPair
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.file import RunConfig
from switchkd.study.file import StudyEvaluation
from switchkd.study.plan import StudyRun
from switchkd.study.rows import DISTANCES


def measure(row: StudyRun, run: RunConfig, model: str, answers: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's results on each set: those of each row, and their means."""
    config, given = run.config(), {**row.evaluation, "seeds": tuple(row.evaluation["seeds"])}
    evaluation = StudyEvaluation(**given)
    pair = _loaded(row, run, model, with_teacher=evaluation.distance)
    assert pair.tokenizer is not None
    settings = evaluation.settings(config)
    pair.check_room(settings.max_prompt_tokens + settings.sampling.max_new_tokens)

    def engine_for(pair: ModelPair) -> SpeculativeEngine:
        return SpeculativeEngine(pair, config.block_size, max_rows=config.rollout_rows, compile=config.compile)

    engine, teacher_engine = engine_for(pair), None if pair.teacher is None else engine_for(pair.swapped())
    sets = {name: resolve(name, "eval", data_dir=run.data_dir, limit=evaluation.limit) for name in evaluation.sets}
    found = evaluate(
        engine,
        pair.tokenizer,
        sets,
        model_name=row.name,
        settings=settings,
        out_folder=answers,
    )
    scores, by_row = {}, {name: _by_row(answers_file(answers, name)) for name in evaluation.sets}
    for name, result in found.sets.items():
        parts = {"all": result.overall, **result.by_bucket}
        scores[name] = {part: {"rows": each.rows, **each.mean.flat()} for part, each in parts.items()}
        if teacher_engine is not None:
            _add_distance(by_row[name], scores[name], _distance(engine, teacher_engine, sets[name], settings))
    return by_row, scores


def _loaded(row: StudyRun, run: RunConfig, model: str, *, with_teacher: bool) -> ModelPair:
    """The model that is measured; with the run's teacher beside it, unless it is that teacher."""
    config = run.config()
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
    # No teacher is measured beside itself.
    near = run.teacher if with_teacher and row.kind != "teacher" and run.is_teacher_named else None
    if near is not None:
        of_teacher = how["teacher"]
        how[row.kind] = how.get(row.kind, {}) | {
            "teacher_quantization": of_teacher["student_quantization"],
            "teacher_model_init_kwargs": of_teacher["model_init_kwargs"],
        }
    pair = load_pair(
        model,
        near,
        placement=config.placement,
        trust_remote_code=run.trust_remote_code,
        **how.get(row.kind, {}),
    )
    if row.kind == "start" and run.is_teacher_named:
        assert pair.tokenizer is not None
        teacher_tokenizer = load_tokenizer(
            str(run.teacher), trust_remote_code=run.trust_remote_code, revision=run.teacher_revision
        )
        set_template(pair.tokenizer, teacher_tokenizer, config.template_from)
    return pair


def _distance(
    engine: SpeculativeEngine,
    teacher_engine: SpeculativeEngine,
    rows: Sequence[SourceRow],
    settings: EvaluationSettings,
) -> Distance:
    """The distance to the teacher on the rows that were answered, in their order."""
    assert engine.pair.tokenizer is not None
    longest = settings.sampling.max_new_tokens
    loaded = to_examples(
        rows,
        engine.pair.tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=longest,
        need_response=True,
        skip_bad_rows=True,
        rendering=replace(settings.rendering, prompts_alone=True),
    )
    prompts = [example.prompt for example in loaded.examples]
    return distance_to_teacher(
        engine.pair,
        prompts,
        max_new_tokens=longest,
        seed=settings.seeds[0],
        engine=engine,
        teacher_engine=teacher_engine,
    )


def _add_distance(by_row: dict[str, Any], scores: dict[str, dict[str, Any]], distance: Distance) -> None:
    """Put both divergences, nats a response, beside what is kept of each row and of each part of a set."""
    labels = [by_row["buckets"][at] for at in by_row["bucket_of"]]
    for measure, found in zip(DISTANCES, (distance.reverse, distance.forward), strict=True):
        by_row[measure] = [[round(nats, 5) for nats in found.per_sequence]]
        for part, of_part in {"all": found, **found.by(labels)}.items():
            scores[part] |= {measure: of_part.mean, f"{measure}_per_token": of_part.per_token}


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
