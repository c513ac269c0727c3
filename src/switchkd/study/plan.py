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
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.parts import described
from switchkd.methods.table import METHOD, REPLACEABLE, Method
from switchkd.run.file import OWN_HINTS, RunConfig, run_defaults, run_from_values
from switchkd.serving.teacher import is_address
from switchkd.study.file import START, TEACHER, StudyConfig

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
    all that decides what comes out, whatever the machine, the number of workers and the folder.
    """

    kind: Kind
    method: str
    setting: str
    seed: int | None
    budget: str
    values: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    identity: str

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

    Everything is checked: methods, settings, and that the evaluation's sets are there. Raises UserError that names the method.
    """
    runs = [
        _training(study, method, setting, seed)
        for seed in study.seeds
        for setting in study.settings
        for method in study.methods
    ]
    untrained = {row.identity: row for run in runs for row in _untrained(study, run)}
    for name in study.evaluation.sets:
        resolve(name, "eval", data_dir=study.run.get("data_dir"), limit=study.evaluation.limit)
    if len({run.identity for run in runs}) < len(runs):
        twice = next(run for run in runs if [each.identity for each in runs].count(run.identity) > 1)
        others = [each.name for each in runs if each.identity == twice.identity]
        raise UserError(f"{' and '.join(others)} are the same run; change one of them, or leave it out")
    return [*runs, *_named_where_several([*untrained.values()])]


def _training(study: StudyConfig, method: str, setting: str, seed: int) -> StudyRun:
    values = {**study.run, **study.settings[setting], **study.methods[method], **study.budget.of_run, "seed": seed}
    evaluation = asdict(study.evaluation)
    name = ", ".join(filter(None, (f"method {method!r}", setting)))
    try:
        run = run_from_values({"output_dir": study.output_dir, **values}, f"in {name}")
        config = run.config()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if study.budget.tokens is not None and not (config.plan.rolls_out or config.plan.teacher_text):
        raise UserError(
            f"{name}: the budget is {study.budget}, but nothing is written in such a run; give steps or seconds"
        )
    if study.evaluation.distance and run.teachers:
        raise UserError(
            f"{name}: evaluation.distance is the distance to the teacher, and there are several; set it to false"
        )
    deciding = {**_deciding(run), "law": _law_of(config)}
    identity = _hash({"run": deciding, "evaluation": _given(study.evaluation)})
    return StudyRun("run", method, setting, seed, str(study.budget), values, evaluation, identity)


def _untrained(study: StudyConfig, run: StudyRun) -> list[StudyRun]:
    """The start and the teacher of a run, to be measured as they are."""
    rows, found = [], run.run(Path(study.output_dir)).effective_settings()
    for kind, keys in _UNTRAINED.items():
        # One on a server can be asked for scores, not for answers.
        if found.get(keys[0]) not in (None, "self") and not is_address(found[keys[0]]):
            deciding = {key: value for key in (*keys, *_OF_MODEL) if (value := found.get(key)) is not None}
            identity = _hash({kind: deciding, "evaluation": _given(study.evaluation)})
            name = str(found[keys[0]])
            rows.append(StudyRun(kind, kind, name, None, "", run.values, run.evaluation, identity))
    return rows


def _named_where_several(rows: Sequence[StudyRun]) -> list[StudyRun]:
    """The starts and teachers, which say whose they are only where there are several of a kind."""
    kinds = [row.kind for row in rows]
    return [row if kinds.count(row.kind) > 1 else replace(row, setting="") for row in rows]


def _deciding(run: RunConfig) -> dict[str, Any]:
    """The values that were set and decide what the run leaves. Defaults are left out, so that a new setting changes nothing."""
    given = {**run.training, **{key: getattr(run, key) for key in OWN_HINTS}}
    defaults = {**run_defaults(), **{each.name: each.default for each in fields(RunConfig)}}
    return {
        key: described(value)
        for key, value in given.items()
        if value != defaults.get(key) and key not in _UNDECIDING and not key.startswith(_UNDECIDING_PREFIXES)
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
