"""What a study is: one YAML file with the values that its runs share, its methods, its seeds, its budget and its evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from switchkd.errors import UserError, did_you_mean
from switchkd.evaluation.measures import Match
from switchkd.evaluation.score import EvaluationSettings
from switchkd.methods.config import SwitchConfig
from switchkd.records import Sampling
from switchkd.run.file import read_mapping, typed_setting
from switchkd.settings.components import setting
from switchkd.settings.typed import typed

START: Final = "start"
TEACHER: Final = "teacher"
# What a study decides for its runs.
_DECIDED = {
    "output_dir": "each run has a folder of its own",
    "run_name": "each run is named by its method and seed",
    "seed": "seeds lists them",
    "max_steps": "budget says how long a run is",
    "num_train_epochs": "budget says how long a run is",
    "max_seconds": "budget says how long a run is",
    "max_generated_tokens": "budget says how long a run is",
    "stages": "a run of a study has one stage; train what comes before it once, and name that as student",
}
# Where seconds or tokens end a run, steps have to be out of the way.
_NO_END = 10_000_000


@dataclass(frozen=True)
class Budget:
    """How long each run trains: exactly one of the three. Raises UserError for none, several, or none above 0."""

    steps: int | None = setting(None, "Optimizer steps.")
    seconds: float | None = setting(None, "Seconds of training on one core, without loading and evaluation.")
    tokens: int | None = setting(None, "Tokens that student and teacher write; methods on data alone write none.")

    def __post_init__(self) -> None:
        given = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}
        if len(given) != 1:
            raise UserError(f"budget is {given or 'empty'}; give exactly one of steps, seconds and tokens")
        if not next(iter(given.values())) > 0:
            raise UserError(f"budget is {given}; it has to be above 0")

    @property
    def of_run(self) -> dict[str, Any]:
        """The values of a run file that hold a run to the budget."""
        if self.steps is not None:
            return {"max_steps": self.steps}
        name = "max_seconds" if self.seconds is not None else "max_generated_tokens"
        return {"max_steps": _NO_END, name: self.seconds if self.seconds is not None else self.tokens}

    def __str__(self) -> str:
        """Such as "200 steps"."""
        return next(
            f"{value:,} {each.name}" for each in fields(self) if (value := getattr(self, each.name)) is not None
        )


@dataclass(frozen=True)
class StudyEvaluation:
    """What every student answers, and how: greedily, unless a temperature and seeds are given."""

    sets: list[str] = field(metadata={"help": "Names of sets, such as world:test; files or hub names."})
    limit: int | None = setting(None, "Only the first rows of each set.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = setting(1.0, "Nucleus; 1 keeps every token.")
    seeds: tuple[int, ...] = setting((10,), "Seeds of the sampling.")
    max_new_tokens: int | None = setting(None, "Longest answer; by default as in the run.")
    match: Match = setting("text", "Exact match by text, numeric or lines.")
    distance: bool = setting(False, "Both KL divergences a response to the teacher too, on a sample for each row.")

    def settings(self, run: SwitchConfig) -> EvaluationSettings:
        """As `evaluate` takes them, for the student of a run."""
        longest = self.max_new_tokens or run.max_new_tokens
        sampling = Sampling(longest, temperature=self.temperature, top_p=self.top_p)
        return EvaluationSettings(sampling, tuple(self.seeds), run.max_prompt_tokens, run.rendering, self.match)


@dataclass(frozen=True)
class StudyConfig:
    """A study: every method with every seed under every setting, each a run of equal budget on the same evaluation."""

    run: dict[str, Any] = field(metadata={"help": "Values of a run file that all runs share."})
    methods: dict[str, dict[str, Any]] = field(metadata={"help": "By name: the values of a run file that differ."})
    budget: Budget = field(metadata={"help": "One of steps, seconds and tokens."})
    evaluation: StudyEvaluation = field(metadata={"help": "sets, limit, temperature, seeds, ..."})
    output_dir: str = field(metadata={"help": "The study's folder; by default runs/ and the file's name."})
    seeds: tuple[int, ...] = setting((10,), "Seeds of training.")
    settings: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"": {}}, metadata={"help": "By name: values under which all methods are run."}
    )
    baseline: str | None = setting(None, "The method that others are compared with; by default the first.")
    workers: int | None = setting(None, "Runs at a time, one thread each; by default the number of cores.")
    keep_models: bool = setting(False, "Keep the trained models; else only what was measured is kept.")

    @property
    def compared_with(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.methods))

    @property
    def processes(self) -> int:
        """Runs at a time."""
        # What this process may use can be less than the machine has.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.workers or cores or 1


def read_study(path: str | Path) -> StudyConfig:
    """The study that a YAML file describes.

    Raises UserError for a file that is missing or not YAML, an unknown key (naming the nearest), a wrong type, and a key that
    is required and missing.
    """
    path = Path(path)
    return study_from_values({"output_dir": f"runs/{path.stem}", **read_mapping(path)}, f"in {path}")


def study_from_values(values: Mapping[str, Any], origin: str) -> StudyConfig:
    """The study of nested values, all typed and checked; see `read_study`."""
    values = {key: {} if key in ("methods", "run") and value is None else value for key, value in values.items()}
    if isinstance(methods := values.get("methods"), Mapping):
        # A method whose row says it all has no changes: nothing stands behind its name.
        values["methods"] = {name: {"method": str(name)} if given is None else given for name, given in methods.items()}
    hints = {**get_type_hints(StudyConfig), "budget": dict[str, Any], "evaluation": dict[str, Any]}
    hints |= {"seeds": list[int], "methods": dict[str, dict[str, Any]]}
    given = _checked(StudyConfig, values, hints, origin)
    budget = _checked(Budget, given["budget"], get_type_hints(Budget), f"budget {origin}")
    hints = {**get_type_hints(StudyEvaluation), "seeds": list[int]}
    evaluation = _checked(StudyEvaluation, given["evaluation"], hints, f"evaluation {origin}")
    if "seeds" in evaluation:
        evaluation["seeds"] = tuple(evaluation["seeds"])
    given |= {"budget": Budget(**budget), "evaluation": StudyEvaluation(**evaluation)}
    study = StudyConfig(**{**given, "seeds": tuple(given.get("seeds", StudyConfig.seeds))})
    _check(study, origin)
    return study


def _checked(kind: type[Any], values: Mapping[str, Any], hints: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values in the types of the class's fields; raises UserError for unknown, missing and wrong ones."""
    known = [each.name for each in fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"there is no setting {key!r} ({origin}){did_you_mean(key, known)}")
    for each in fields(kind):
        if each.default is MISSING and each.default_factory is MISSING and values.get(each.name) is None:
            raise UserError(f"{each.name} is missing ({origin}); set it")
    return {key: typed(key, value, hints[key], origin) for key, value in values.items()}


def _check(study: StudyConfig, origin: str) -> None:
    for name, what in (("methods", study.methods), ("seeds", study.seeds), ("settings", study.settings)):
        if not what:
            raise UserError(f"{name} is empty ({origin}); give at least one")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds is {list(study.seeds)} ({origin}); give each once")
    if study.workers is not None and study.workers < 1:
        raise UserError(f"workers is {study.workers} ({origin}); it has to be at least 1")
    if not study.evaluation.sets:
        raise UserError(f"evaluation.sets is empty ({origin}); give at least one set")
    if study.evaluation.limit is not None and study.evaluation.limit < 1:
        raise UserError(f"evaluation.limit is {study.evaluation.limit} ({origin}); it has to be at least 1")
    if taken := {START, TEACHER} & study.methods.keys():
        raise UserError(f"a method is named {taken.pop()!r} ({origin}), as a row of every table is; give another name")
    if study.baseline is not None and study.baseline not in (START, *study.methods):
        raise UserError(
            f"baseline is {study.baseline!r} ({origin}){did_you_mean(study.baseline, [START, *study.methods])}"
        )
    parts: Sequence[tuple[str, Mapping[str, Any]]] = [
        ("run", study.run),
        *study.methods.items(),
        *study.settings.items(),
    ]
    for name, values in parts:
        for key, value in values.items():
            if key in _DECIDED:
                raise UserError(f"{key} is set in {name or 'settings'} ({origin}), but {_DECIDED[key]}; leave it out")
            typed_setting(key, value, f"{name} {origin}")
