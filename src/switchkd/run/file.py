"""What a run is: one YAML file of flat keys, its values typed and checked, and the stages that it consists of."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import Plan, check_evaluation, plan_of


@dataclass(frozen=True)
class RunConfig:
    """A run: models, data, where it goes, and `training`, the fields of `SwitchConfig` that were given.

    Every field of the two stands in the run file under its own name. `stages` are changes to them, one mapping a stage.
    """

    student: str = field(metadata={"help": "Hub id, folder, .gguf file, package:NAME or world:student."})
    train_data: str = field(metadata={"help": "A set's name, a file or a hub name, with :SPLIT where needed."})
    output_dir: str = field(metadata={"help": "The run's folder; by default runs/ and the run file's name."})
    teacher: str | None = field(default=None, metadata={"help": "As student; self: the student without its adapter."})
    eval_data: str | None = field(default=None, metadata={"help": "As train_data; see eval_strategy and eval_steps."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder that holds the instruction sets as files."})
    student_drop_layers: str | None = field(
        default=None, metadata={"help": "Decoder layers removed from the student at the start, such as '10-19'."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the student's weights."})
    teacher_dtype: str | None = field(default=None, metadata={"help": "Precision of the teacher's; as dtype if unset."})
    teacher_quantization: str | None = field(
        default=None, metadata={"help": "8bit or 4bit weights of the teacher, by bitsandbytes."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    peft: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of peft.LoraConfig; the run then trains an adapter and merges it."}
    )
    training: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()

    def given(self) -> dict[str, Any]:
        """Flat values, without the stages: all of the run's own fields, and of training's those that were given."""
        own = asdict(self)
        return {name: own[name] for name in OWN_HINTS} | dict(self.training)

    def in_force(self) -> dict[str, Any]:
        """All values that act, flat and in the order of the run file: as `given`, and every default that is not None."""
        defaults = {name: default_of(each) for name, each in TRAINING_FIELDS.items()}
        set_defaults = {name: value for name, value in defaults.items() if value is not None or name in SWITCH_FIELDS}
        ordered = {name: set_defaults[name] for name in (*SWITCH_FIELDS, *set_defaults) if name in set_defaults}
        return {name: self.given()[name] for name in OWN_HINTS} | ordered | dict(self.training)

    def arguments(self) -> SwitchConfig:
        """The trainer's arguments; raises UserError where values that are right alone contradict each other."""
        try:
            arguments = SwitchConfig(output_dir=self.output_dir, disable_tqdm=True, **self.training)
            arguments.sampling  # noqa: B018 - checks its values
        except (ValueError, TypeError) as error:
            raise UserError(f"the settings of the run do not fit: {error}") from error
        for name in ("max_prompt_tokens", "rollout_rows", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(arguments, name) < 1:
                raise UserError(f"{name} is {getattr(arguments, name)}; it has to be at least 1")
        if arguments.do_eval and self.eval_data is None:
            raise UserError(f"eval_strategy is {str(arguments.eval_strategy)!r}, but there is no eval_data; set it")
        return arguments

    def in_stages(self) -> list[Stage]:
        """The run as stages, each a run of its own that starts from the student that the one before it leaves.

        A run without stages is one stage in the run's own folder. Stages write into <output_dir>/1-kd and so on, but
        the last one's model goes to the run's folder. Raises UserError for a bad value in any of them.
        """
        if not self.stages:
            return [Stage("", self, Path(self.output_dir), tokenizer=self.student)]
        stages: list[Stage] = []
        base = replace(self, stages=())
        for number, changes in enumerate(self.stages, start=1):
            config = base.changed(changes, f"in stage {number}")
            name = f"{number}-{config.training.get('method', SwitchConfig.method)}"
            folder = Path(self.output_dir) / name
            config = replace(config, output_dir=str(folder))
            tokenizer = config.student
            if stages and "student" not in changes:
                # What an earlier stage removed or adapted is in the student that it leaves.
                config = replace(
                    config, student=str(stages[-1].model_folder), student_drop_layers=changes.get("student_drop_layers")
                )
                tokenizer = stages[-1].tokenizer
            is_last = number == len(self.stages)
            stages.append(Stage(name, config, Path(self.output_dir) if is_last else folder, tokenizer))
        return stages

    def changed(self, changes: Mapping[str, Any], origin: str) -> RunConfig:
        """The run with some flat values replaced; `origin` says in an error where they are from."""
        values = {key: typed(key, value, origin) for key, value in changes.items()}
        own = {key: value for key, value in values.items() if key in OWN_HINTS}
        return replace(self, **own, training={**self.training, **{k: v for k, v in values.items() if k not in own}})


@dataclass(frozen=True)
class Stage:
    """One training of a run: `config` has no stages, its output_dir is the stage's.

    `model_folder` is where its model goes; `tokenizer` names a model that is there before the run starts.
    """

    name: str
    config: RunConfig
    model_folder: Path
    tokenizer: str

    @property
    def folder(self) -> Path:
        """Where the stage's checkpoints are."""
        return Path(self.config.output_dir)

    def plan(self) -> Plan:
        """What the trainer carries out; raises UserError for settings that do not fit, and for a missing teacher."""
        arguments = self.config.arguments()
        plan = plan_of(arguments)
        if self.config.teacher is None and plan.needs_teacher:
            raise UserError(f"method {arguments.method!r} needs a teacher; set teacher in the run file")
        check_evaluation(plan, arguments, has_data=self.config.eval_data is not None)
        return plan


# ------------------------------------------------------------------------------------------------------ known settings

_NOT_SETTINGS = ("training", "stages")
OWN_HINTS = {name: hint for name, hint in get_type_hints(RunConfig).items() if name not in _NOT_SETTINGS}
TRAINING_FIELDS: dict[str, Field[Any]] = {
    each.name: each for each in fields(SwitchConfig) if each.init and each.name not in OWN_HINTS
}
SWITCH_FIELDS = tuple(name for name in vars(SwitchConfig)["__annotations__"] if name in TRAINING_FIELDS)
HINTS: dict[str, Any] = {**get_type_hints(SwitchConfig), **OWN_HINTS}


def default_of(each: Field[Any]) -> Any:
    """The default of a dataclass field, None where it has none."""
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def typed(key: str, value: Any, origin: str) -> Any:
    """The value of a setting in the type of its field; raises UserError for an unknown key or a wrong type."""
    if key not in OWN_HINTS and key not in TRAINING_FIELDS:
        raise UserError(
            f"there is no setting {key!r} ({origin}){did_you_mean(key, [*OWN_HINTS, *TRAINING_FIELDS, 'stages'])}"
        )
    try:
        return _as_type(value, HINTS[key])
    except ValueError:
        raise UserError(f"{key} is {value!r} ({origin}); it has to be {_expected(HINTS[key])}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the known word nearest to a mistyped one."""
    choices = list(known)
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose one of {', '.join(sorted(choices)[:40])}, ..."


def _as_type(value: Any, hint: Any) -> Any:
    """The value as `hint` has it; YAML 1.1 reads 5e-4 as text and `no` as false. Raises ValueError where it does not fit."""
    if hint is Any:
        return value
    if get_origin(hint) in (Union, types.UnionType):
        return _as_one_of(value, _arms(hint))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError
    if _is_enum(hint):
        return hint(value).value
    converter = _CONVERTERS.get(get_origin(hint) or hint)
    if converter is None:
        raise ValueError
    return converter(value)


def _arms(hint: Any) -> list[Any]:
    """The types of a union, text last; where there is an enumeration, text stands for its values only."""
    arms = sorted(get_args(hint), key=lambda arm: arm is str)
    return [arm for arm in arms if arm is not str] if any(map(_is_enum, arms)) else arms


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _as_one_of(value: Any, hints: Sequence[Any]) -> Any:
    for attempt in (value, "no") if value is False else (value,):
        for hint in hints:
            try:
                return _as_type(attempt, hint)
            except ValueError:
                continue
    raise ValueError


def _whole_number(value: Any) -> int:
    number = _number(value)
    if not math.isfinite(number) or number != int(number):
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return check


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    int: _whole_number,
    float: _number,
    **{kind: _exactly(kind) for kind in (bool, str, list, dict, types.NoneType)},
}
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_expected(arm) for arm in _arms(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if _is_enum(hint):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    return _KINDS.get(get_origin(hint) or hint, "left out")


# -------------------------------------------------------------------------------------------------------- the run file


def read_run(path: str | Path, assignments: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with `key=value` assignments put over it (stages.0.max_steps=3 reaches a stage).

    Raises UserError for a file that is missing or no YAML, an unknown key (naming the nearest), a wrong type (naming
    key, value and the type), and a key that is required and missing.
    """
    path = Path(path)
    values = read_mapping(path)
    for assignment in assignments:
        _assign(values, assignment)
    return run_from_values(
        {"output_dir": f"runs/{path.stem}", **values}, f"in {path}" + (" or --set" if assignments else "")
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError that names the file, and the line of a fault."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no run file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}; correct it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} has to hold settings, one `key: value` a line")
    return values


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Set the value that `key=value` or `key.key=value` names, the value read as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"--set {assignment!r} cannot be read; write --set key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment!r}: the value is not YAML; quote it") from None
    target: Any = values
    *parents, last = path.split(".")
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        target[int(last) if isinstance(target, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise UserError(f"--set {assignment!r}: there is nothing at {path!r} to set; check the key") from None


def run_from_values(values: Mapping[str, Any], origin: str) -> RunConfig:
    """The run of flat values and their stages, all typed and checked; see `read_run`."""
    stages = values.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(
            f"stages is {stages!r} ({origin}); it has to be a list with a mapping of settings for each stage"
        )
    checked = {key: typed(key, value, origin) for key, value in values.items() if key != "stages"}
    for name in ("student", "train_data"):
        if checked.get(name) is None:
            raise UserError(f"{name} is missing {origin}; set it")
    own = {key: checked.pop(key) for key in OWN_HINTS if key in checked}
    typed_stages = []
    for number, stage in enumerate(stages, start=1):
        if "output_dir" in stage:
            raise UserError(
                f"output_dir is set in stage {number} ({origin}); stages write into the run's folder, leave it out"
            )
        typed_stages.append({key: typed(key, value, f"stage {number} {origin}") for key, value in stage.items()})
    return RunConfig(**own, training=checked, stages=tuple(typed_stages))
