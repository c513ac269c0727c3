"""What a run is: one YAML file, its values typed and checked, and the stages that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from switchkd.data.sources import sources_of
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.inherited import in_plain_words
from switchkd.methods.parts import AUTO, COMPONENTS, HEADLINE, check_not_moved
from switchkd.methods.plan import AutoThreshold
from switchkd.methods.remote_teacher import check_remote_teacher
from switchkd.models.load import revision_in
from switchkd.rollout.policies import Switch
from switchkd.run.recipes import RECIPE, recipe_file
from switchkd.serving.teacher import is_address
from switchkd.settings.components import setting, settings_of
from switchkd.settings.mapping import KeyTwice, StrictLoader
from switchkd.settings.mapping import read_mapping as read_mapping
from switchkd.settings.typed import typed
from switchkd.settings.unknown import unknown_setting
from switchkd.training.taught import check_several_teachers, check_teacher_column
from switchkd.training.teachers import SELF


@dataclass(frozen=True)
class RunConfig:
    """A run: models, data, where it goes, and `training`, the fields of `SwitchConfig` that were given.

    Every field of the two stands in the run file under its own name. `stages` holds one mapping of changes for each stage.
    """

    student: str = field(metadata={"help": "Hub id, folder, .gguf file, package:NAME or world:student."})
    train_data: str | dict[str, Any] | list[Any] = field(
        metadata={
            "help": "A set's name, a file or a hub name, with :SPLIT where needed; or {path: ...}, or a list of these."
        }
    )
    output_dir: str = field(metadata={"help": "The run's folder; by default runs/ and the run file's name."})
    teacher: str | None = setting(
        None,
        "As student; self: the student without its adapter; http://HOST:PORT: on a server of vLLM's (docs/vllm.md).",
    )
    teachers: dict[str, str] | None = setting(
        None,
        "Several in place of teacher, {NAME: as teacher, ...}; each row names its own in teacher_column (docs/data.md).",
    )
    eval_data: str | dict[str, Any] | list[Any] | None = setting(
        None, "As train_data; see eval_strategy and eval_steps."
    )
    columns: dict[str, str] | None = setting(
        None, "Our names of columns, each with your data's name for it: {prompt: question}."
    )
    data_dir: str | None = setting(None, "Folder that holds the instruction sets as files.")
    student_drop_layers: str | None = setting(
        None, "Decoder layers removed from the student at the start, such as '10-19'."
    )
    device: str = setting("auto", "cpu, cuda or mps; auto is the first there of cuda, mps, cpu.")
    student_quantization: str | None = setting(
        None, "8bit or 4bit weights of the student under an adapter (QLoRA), by bitsandbytes; needs adapter: keep."
    )
    teacher_quantization: str | None = setting(None, "8bit or 4bit weights of the teacher, by bitsandbytes.")
    trust_remote_code: bool = setting(False, "Run code that comes with a model.")
    peft: dict[str, Any] | None = setting(None, "Settings of peft.LoraConfig; the run then trains an adapter.")
    adapter: Literal["merge", "keep"] = setting(
        "merge", "Whether the adapter is merged into the model that the run leaves, or kept beside its base model."
    )
    training: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = setting(
        (),
        "A list with a mapping of changes for each stage; each starts from the student that the one before it leaves.",
    )

    def effective_settings(self) -> dict[str, Any]:
        """All values that act, flat, without the stages, in the order of the run file; defaults of None are left out."""
        defaults = run_defaults()
        if not any("policy" in part for part in (self.training, *self.stages)):
            # Flat settings beside a policy of one's own would say the same thing twice.
            defaults |= {name: settings_of(Switch)[name].default for name in HEADLINE}
            defaults["threshold"] = {"name": AUTO, **asdict(AutoThreshold())}
        ordered = {name: defaults[name] for name in SWITCH_FIELDS}
        ordered |= {name: value for name, value in defaults.items() if value is not None}
        return {name: getattr(self, name) for name in OWN_HINTS} | ordered | dict(self.training)

    def config(self) -> SwitchConfig:
        """The trainer's settings. Raises UserError where they do not fit together, and for a missing teacher."""
        on_cpu = {"use_cpu": True} if self.device == "cpu" else {}
        try:
            # Our own progress bar takes the place of tqdm's.
            config = SwitchConfig(output_dir=self.output_dir, disable_tqdm=True, **{**self.training, **on_cpu})
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"the settings of the run do not fit: {in_plain_words(str(error))}") from error
        if self.device not in ("auto", config.placement.device.type):
            raise UserError(
                f"device is {self.device!r}, but this run would be on {config.placement.device}; take auto, cpu, or a device "
                f"that is here without its number (CUDA_VISIBLE_DEVICES=1 makes the second GPU the first)"
            )
        if config.resume_from_checkpoint:
            raise UserError(
                f"resume_from_checkpoint is {config.resume_from_checkpoint!r}, but a run goes on from the last checkpoint in its "
                f"output_dir; leave it out, and give --resume"
            )
        self._check_adapter()
        config.check_evaluation(has_data=self.eval_data is not None)
        self._check_teachers(config)
        return config

    @property
    def is_teacher_named(self) -> bool:
        """Whether the teacher is a model of its own that is loaded here."""
        return self.teacher not in (None, SELF) and not is_address(self.teacher)

    @property
    def teachers_here(self) -> dict[str, str]:
        """The models that are loaded here as teachers, by the name that rows give; "" is the teacher of all rows."""
        if self.teachers:
            return {name: each for name, each in self.teachers.items() if not is_address(each)}
        return {"": str(self.teacher)} if self.is_teacher_named else {}

    @property
    def student_revision(self) -> str | None:
        """The revision that is pinned for the student."""
        return revision_in(self.training.get("model_init_kwargs"))

    @property
    def teacher_revision(self) -> str | None:
        """The revision that is pinned for the teacher, or for all teachers."""
        return revision_in(self.training.get("teacher_model_init_kwargs"))

    def _check_teachers(self, config: SwitchConfig) -> None:
        """Raise UserError unless there is a teacher, or several, that can do what the method asks, or it asks for nothing."""
        if self.teachers is not None and self.teacher is not None:
            raise UserError(
                "teacher and teachers are both set; leave one of them out (in a stage of another kind, set the other to null)"
            )
        if self.teachers is not None:
            check_several_teachers(config, self.teachers)
        else:
            check_teacher_column(config)
            sources = [source for data in (self.train_data, self.eval_data) if data for source in sources_of(data)]
            if said := next((source for source in sources if source.teacher), None):
                raise UserError(
                    f"the data source {said.path} says teacher: {said.teacher}, but there are no teachers; set them, or leave it "
                    f"out"
                )
        if not config.plan.needs_teacher:
            return
        if self.teacher is None and self.teachers is None:
            raise UserError(f"method {config.method!r} needs a teacher; set teacher in the run file")
        if is_address(self.teacher):
            check_remote_teacher(config, str(self.teacher))
        if self.teacher_quantization and not self.teachers_here and self.teacher != SELF:
            raise UserError(
                f"teacher_quantization is {self.teacher_quantization!r}, but {self.teacher or 'each teacher'} is loaded by its "
                f"server; leave it out"
            )

    def _check_adapter(self) -> None:
        """Raise UserError for an adapter that could not be kept, and for packed weights that could not be trained."""
        if self.peft is None and (self.adapter == "keep" or self.student_quantization):
            given = (
                "adapter is keep" if self.adapter == "keep" else f"student_quantization is {self.student_quantization}"
            )
            raise UserError(f"{given}, but no adapter is trained; set peft, or leave it out")
        if self.adapter == "keep" and self.student_drop_layers:
            raise UserError(
                "adapter is keep, but its base model would be one without the layers of student_drop_layers, which nothing "
                "keeps; set adapter to merge"
            )
        if self.adapter == "merge" and self.student_quantization:
            raise UserError(
                f"adapter is merge, which would round what was learned to the {self.student_quantization} of "
                f"student_quantization; set adapter to keep (in a run of stages the earlier ones merge)"
            )

    def in_stages(self) -> list[Stage]:
        """The run as stages; each starts from the student that the one before it leaves.

        A run without stages is one stage in the run's own folder. Otherwise stages write into <output_dir>/1-kd and so on, but
        the last one's model goes to the run's folder. Raises UserError for a bad value in any of them.
        """
        if not self.stages:
            stage = Stage("", self, self.config(), Path(self.output_dir), self.student, self.student_revision)
            return [stage]
        stages: list[Stage] = []
        base = replace(self, stages=())
        for number, changes in enumerate(self.stages, start=1):
            run = base.changed(changes, f"in stage {number}")
            name = f"{number}-{run.training.get('method', SwitchConfig.method)}"
            folder = Path(self.output_dir) / name
            # The next stage starts from a whole model.
            adapter = run.adapter if number == len(self.stages) else "merge"
            run = replace(run, output_dir=str(folder), adapter=adapter)
            tokenizer, revision = run.student, run.student_revision
            if stages and "student" not in changes:
                # Layers that an earlier stage removed, and its adapter, are part of the student that it leaves.
                run = replace(
                    run, student=str(stages[-1].model_folder), student_drop_layers=changes.get("student_drop_layers")
                )
                tokenizer, revision = stages[-1].tokenizer, stages[-1].tokenizer_revision
            # What the run is for lies where the run is; the models on the way to it lie deeper.
            model_folder = Path(self.output_dir) if number == len(self.stages) else folder
            before = tuple(stage.name for stage in stages)
            stages.append(Stage(name, run, run.config(), model_folder, tokenizer, revision, before))
        return stages

    def changed(self, changes: Mapping[str, Any], origin: str) -> RunConfig:
        """The run with some flat values replaced; errors say `origin`, where they come from."""
        values = {key: typed_setting(key, value, origin) for key, value in changes.items()}
        own = {key: value for key, value in values.items() if key in OWN_HINTS}
        return replace(self, **own, training={**self.training, **{k: v for k, v in values.items() if k not in own}})


@dataclass(frozen=True)
class Stage:
    """One training of a run: `run` has no stages and writes into the stage's folder; `config` is what its trainer gets.

    `model_folder` is where its model goes; `tokenizer` names a model that exists before the run starts, with the revision that
    was pinned for it; `before` names the stages before it.
    """

    name: str
    run: RunConfig
    config: SwitchConfig
    model_folder: Path
    tokenizer: str
    tokenizer_revision: str | None = None
    before: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the stage's checkpoints are."""
        return Path(self.run.output_dir)


_NOT_SETTINGS = ("training", "stages")
OWN_HINTS = {name: hint for name, hint in get_type_hints(RunConfig).items() if name not in _NOT_SETTINGS}
TRAINING_FIELDS: dict[str, Field[Any]] = {
    name: each for name, each in settings_of(SwitchConfig).items() if name not in OWN_HINTS
}
SWITCH_FIELDS = tuple(name for name in vars(SwitchConfig)["__annotations__"] if name in TRAINING_FIELDS)
# What a run file may hold beyond the settings of transformers.
OUR_FIELDS: dict[str, Field[Any]] = {
    **{name: each for name, each in settings_of(RunConfig).items() if name != "training"},
    **{name: TRAINING_FIELDS[name] for name in SWITCH_FIELDS},
}
HINTS: dict[str, Any] = {**get_type_hints(SwitchConfig), **OWN_HINTS, "stages": list[dict[str, Any]]}
# Settings with settings of their own: a name stands for a mapping that holds only it.
_NESTED = ("policy", "threshold", "weight", *COMPONENTS)


def _default_of(each: Field[Any]) -> Any:
    """The default of a dataclass field, None where it has none."""
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def run_defaults() -> dict[str, Any]:
    """The default of each setting of a trainer, None where it has none."""
    return {name: _default_of(each) for name, each in TRAINING_FIELDS.items()}


def typed_setting(key: str, value: Any, origin: str) -> Any:
    """The value of a setting in the type of its field; raises UserError for an unknown key or a wrong type."""
    if key not in OWN_HINTS and key not in TRAINING_FIELDS:
        check_not_moved(key)
        own = [*OWN_HINTS, *SWITCH_FIELDS, "stages"]
        raise unknown_setting(key, origin, [*own, *TRAINING_FIELDS], own)
    return typed(key, value, HINTS[key], origin)


def read_run(path: str | Path, assignments: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with `key=value` assignments put over it; recipe:NAME is one of ours.

    A dotted key reaches inside: stages.0.max_steps=3, policy.keep_top_k=10. Raises UserError for a file that is missing or not
    YAML, an unknown key (naming the nearest), a wrong type (naming key, value and type), and a missing key that is required.
    """
    path = recipe_file(str(path)) if str(path).startswith(RECIPE) else Path(path)
    values = read_mapping(path)
    for assignment in assignments:
        _assign(values, assignment)
    return run_from_values(
        {"output_dir": f"runs/{path.stem}", **values}, f"in {path}" + (" or --set" if assignments else "")
    )


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Set the value that `key=value` or `key.key=value` names; the value is read as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"--set {assignment!r} cannot be read; write --set key=value")
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except KeyTwice as twice:
        raise UserError(f"--set {assignment!r}: {twice.problem}; give it once") from None
    except yaml.YAMLError:
        raise UserError(f"--set {assignment!r}: the value is not YAML; quote it") from None
    target: Any = values
    *parents, last = path.split(".")
    try:
        for part in parents:
            if part in _NESTED and isinstance(target.get(part), str):
                target[part] = {"name": target[part]}
            if isinstance(target, dict) and target.get(part) is None:
                # Saved run files write out what is not set.
                target[part] = {}
            target = target[int(part)] if isinstance(target, list) else target[part]
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
    checked = {key: typed_setting(key, value, origin) for key, value in values.items() if key != "stages"}
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
        typed_stages.append(
            {key: typed_setting(key, value, f"stage {number} {origin}") for key, value in stage.items()}
        )
    return RunConfig(**own, training=checked, stages=tuple(typed_stages))
