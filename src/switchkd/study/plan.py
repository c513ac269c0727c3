"""The runs of a study. Each has an identity, which says on any machine whether it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from switchkd.data.sets import resolve
from switchkd.data.shapes import has_answers
from switchkd.data.sources import sources_of
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.parts import described
from switchkd.methods.table import METHOD, REPLACEABLE, Method
from switchkd.models.sources import find_source
from switchkd.run.file import OWN_HINTS, RunConfig, run_defaults, run_from_values
from switchkd.serving.teacher import is_address
from switchkd.study.file import START, TEACHER, Budget, StudyConfig

Kind = Literal["run", "start", "teacher"]

# What changes no number that a run leaves.
_UNDECIDING = {
    "output_dir",
    "data_dir",
    "run_name",
    "report_to",
    "show_rollouts_every",
    "measure_every",
    "rollout_rows",
    "teacher_text",
}
_UNDECIDING_PREFIXES = ("logging_", "log_", "save_", "hub_", "push_")
# What of a run decides how a model answers that is not trained.
_OF_MODEL = ("max_prompt_tokens", "max_new_tokens", "chat_template_kwargs", "add_bos", "template_from")
_UNTRAINED: dict[Kind, tuple[str, ...]] = {
    START: ("student", "student_drop_layers", "student_quantization", "dtype", "model_init_kwargs"),
    TEACHER: ("teacher", "teacher_quantization", "teacher_dtype", "teacher_model_init_kwargs"),
}


@dataclass(frozen=True)
class StudyRun:
    """One row of a study: a method trained with a seed, or the start or the teacher as they are.

    `values` are those of its run file but for its folder; `budget` is what the study says of its length. `identity` is a hash of
    all that decides what comes out, whatever the machine, the number of workers and the folder; `training` is one of what decides
    the trained model alone, "" where none is trained.
    """

    kind: Kind
    method: str
    setting: str
    seed: int | None
    budget: str
    values: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    identity: str
    training: str = ""

    @property
    def name(self) -> str:
        """The name in messages: method, setting and seed."""
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([part for part in (self.method, self.setting) if part] + seed)

    @property
    def folder_name(self) -> str:
        """The name of its folder: readable, and another for every identity."""
        parts = (self.method, self.setting, "" if self.seed is None else str(self.seed), self.identity[:8])
        return "-".join(filter(None, (re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_") for part in parts)))

    def run(self, output_dir: Path) -> RunConfig:
        """Its run, in the folder."""
        return run_from_values({**self.values, "output_dir": str(output_dir)}, f"of {self.name}")


def plan_of(study: StudyConfig) -> list[StudyRun]:
    """All runs of a study, seed by seed, so that a study that is cut off has whole comparisons; then starts and teachers.

    Everything is checked: methods, settings, that models and data are there, and that the sets have answers to compare with.
    Raises UserError that names the method.
    """
    # First: they are part of what each run is, so that one corrected later would have all trained again.
    _check_sets(study)
    looked_up: set[str] = set()
    runs = [
        _training(study, method, setting, seed, looked_up)
        for seed in study.seeds
        for setting in study.settings
        for method in study.methods
    ]
    untrained: dict[str, tuple[StudyRun, list[str]]] = {}
    for run in runs:
        for row in _untrained(study, run):
            untrained.setdefault(row.identity, (row, []))[1].append(run.setting)
    if len({run.identity for run in runs}) < len(runs):
        twice = next(run for run in runs if [each.identity for each in runs].count(run.identity) > 1)
        others = [each.name for each in runs if each.identity == twice.identity]
        raise UserError(f"{' and '.join(others)} are the same run; change one of them, or leave it out")
    return [*runs, *_named_where_several([*untrained.values()])]


def _check_sets(study: StudyConfig) -> None:
    for name in study.evaluation.sets:
        if not has_answers(resolve(name, "eval", data_dir=study.run.get("data_dir"), limit=study.evaluation.limit)):
            raise UserError(f"evaluation.sets: no row of {name} has a response to compare answers with; leave it out")


def _training(study: StudyConfig, method: str, setting: str, seed: int, looked_up: set[str]) -> StudyRun:
    values = {**study.run, **study.settings[setting], **study.methods[method], **study.budget.of_run, "seed": seed}
    evaluation = asdict(study.evaluation)
    name = ", ".join(filter(None, (f"method {method!r}", setting)))
    try:
        run = run_from_values({"output_dir": study.output_dir, **values}, f"in {name}")
        config = run.config()
        study.evaluation.settings(config)
        _check_sources(run, looked_up)
        if study.budget.steps is None:
            _check_endless(run, config, study.budget)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if study.evaluation.distance and run.teachers:
        raise UserError(
            f"{name}: evaluation.distance is the distance to the teacher, and there are several; set it to false"
        )
    deciding = {"run": {**_deciding(run), "law": _law_of(config)}}
    identity = _hash({**deciding, "evaluation": _given(study.evaluation)})
    return StudyRun("run", method, setting, seed, str(study.budget), values, evaluation, identity, _hash(deciding))


def _check_sources(run: RunConfig, looked_up: set[str]) -> None:
    """Raise UserError for a model or a file that is not there; hub names are looked up when they are loaded.

    What an earlier run has looked up is skipped: the runs of a study share their data, and reading it takes a while.
    """
    sources = ("student", "teachers_here", "train_data", "data_dir", "columns")
    key = _hash({name: getattr(run, name) for name in sources})
    if key in looked_up:
        return
    looked_up.add(key)
    for model in filter(None, (run.student, *run.teachers_here.values())):
        find_source(model)
    if not any(source.streaming for source in sources_of(run.train_data)):
        resolve(run.train_data, "train", data_dir=run.data_dir, columns=run.columns)


def _check_endless(run: RunConfig, config: SwitchConfig, budget: Budget) -> None:
    """Raise UserError for what counts on a number of steps, where seconds or tokens end the run."""
    plan = config.plan
    if budget.tokens is not None and (plan.rollout_share == 0 or plan.replay_share == 1):
        raise UserError(f"the budget is {budget}, but a step of such a run may write nothing; give steps or seconds")
    if config.warmup_steps >= 1:
        raise UserError(
            f"warmup_steps is {config.warmup_steps:g}, but the budget is {budget}; give a part below 1, such as 0.025"
        )
    for key in ("save_steps", "eval_steps", "logging_steps"):
        if 0 < (getattr(config, key) or 0) < 1:
            raise UserError(f"{key} is a part of the steps, but the budget is {budget}; give a number of steps")
    if plan.replayed_prefix is not None and plan.replayed_prefix.until:
        raise UserError(f"replayed_prefix shrinks over a number of steps, but the budget is {budget}; give steps")
    if any(source.streaming for source in sources_of(run.train_data)):
        raise UserError(f"a stream is read as far as the steps need it, but the budget is {budget}; give steps")


def _untrained(study: StudyConfig, run: StudyRun) -> list[StudyRun]:
    """The start and the teacher of a run, to be measured as they are."""
    rows, found = [], run.run(Path(study.output_dir)).effective_settings()
    for kind, keys in _UNTRAINED.items():
        # One on a server can be asked for scores, not for answers.
        if found.get(keys[0]) not in (None, "self") and not is_address(found[keys[0]]):
            # Its distance, and its prompts under the teacher's template, are the teacher's matter too.
            beside = study.evaluation.distance or found.get("template_from") == "teacher"
            more = _UNTRAINED[TEACHER] if kind == START and beside else ()
            deciding = {key: value for key in (*keys, *more, *_OF_MODEL) if (value := found.get(key)) is not None}
            identity = _hash({kind: deciding, "evaluation": _given(study.evaluation)})
            name = str(found[keys[0]])
            rows.append(StudyRun(kind, kind, name, None, "", run.values, run.evaluation, identity))
    return rows


def _named_where_several(rows: Sequence[tuple[StudyRun, Sequence[str]]]) -> list[StudyRun]:
    """The starts and teachers. Several of a kind say which model they are, or else under which settings it is measured."""
    kinds, names = [row.kind for row, _ in rows], [(row.kind, row.setting) for row, _ in rows]
    named = []
    for row, settings in rows:
        name = row.setting if kinds.count(row.kind) > 1 else ""
        if names.count((row.kind, row.setting)) > 1:
            name = " and ".join(filter(None, dict.fromkeys(settings))) or f"{name} {row.identity[:4]}"
        named.append(replace(row, setting=name))
    return named


def _deciding(run: RunConfig) -> dict[str, Any]:
    """The values that were set and decide what the run leaves. Defaults are left out, so that a new setting changes nothing."""
    given = {**run.training, **{key: getattr(run, key) for key in OWN_HINTS}}
    defaults = {**run_defaults(), **{each.name: each.default for each in fields(RunConfig)}}
    # No text is written over a checkpoint, so that where several steps are written at once these decide who writes what.
    deciding = {"save_steps", "save_strategy"} if run.training.get("rollout_steps", 1) > 1 else set()
    return {
        key: described(value)
        for key, value in given.items()
        if value != defaults.get(key)
        and (key in deciding or (key not in _UNDECIDING and not key.startswith(_UNDECIDING_PREFIXES)))
    }


def _law_of(config: SwitchConfig) -> dict[str, Any]:
    """The method's row, beyond the defaults of all rows, and who writes: where these change, a run of the same name is another."""
    row, plain = METHOD.make(config.method or ""), Method("")
    changed = {key: described(getattr(row, key)) for key in REPLACEABLE if getattr(row, key) != getattr(plain, key)}
    auto = config.plan.auto_threshold
    return {**changed, "policy": described(config.plan.policy), "auto": auto and asdict(auto)}


def _given(part: Any) -> dict[str, Any]:
    """The fields that are not at their defaults, so that a new one changes no identity."""
    return {
        each.name: value
        for each in fields(part)
        if (value := getattr(part, each.name)) != each.default and each.name != "sets"
    } | {"sets": list(part.sets)}


def _hash(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
