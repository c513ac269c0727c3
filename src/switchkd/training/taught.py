"""A student with its teachers: one, or several by name, each here or on a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.remote_teacher import check_remote_teacher
from switchkd.models.heads import base_of
from switchkd.models.load import LoadedTeacher, load_teachers
from switchkd.models.pair import ModelPair, eos_ids_of
from switchkd.serving.teacher import RemoteTeacher, is_address
from switchkd.training.teachers import SELF, loading_options
from switchkd.training.trained_pair import trained_pair

if TYPE_CHECKING:
    from peft import PeftConfig

Student = ModelPair | PreTrainedModel | str
TeacherModel = PreTrainedModel | LoadedTeacher | str


class Taught(NamedTuple):
    """The student with one of its teachers: a pair; of a teacher on a server, a pair without it, and the server."""

    pair: ModelPair
    remote: RemoteTeacher | None = None


def taught_student(
    model: Student,
    teacher_model: PreTrainedModel | str | Mapping[str, TeacherModel] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: SwitchConfig,
) -> dict[str, Taught]:
    """The student with each of its teachers by name, "" where there is one for all; arguments as in `trained_pair`.

    All pairs hold the same student. A teacher that stands under two names is loaded once. Raises UserError for parts that do not
    fit.
    """
    if not isinstance(teacher_model, Mapping):
        here = None if is_address(teacher_model) else teacher_model
        pair = trained_pair(model, here, tokenizer, peft_config, args)
        return {"": Taught(pair, _remote(teacher_model, pair, args))}
    alone = trained_pair(model, None, tokenizer, peft_config, args)
    if not args.plan.needs_teacher:
        return {"": Taught(alone)}
    loaded = _loaded(teacher_model, alone, args)
    pairs = {
        # Those with a tokenizer were loaded by name, and compared with the student's.
        id(each.model): replace(alone, teacher=each.model, teacher_tokenizer=each.tokenizer, tokenizers_agree=True)
        for each in loaded.values()
    }
    taught = {
        name: Taught(pairs[id(loaded[name].model)]) if name in loaded else Taught(alone, _remote(given, alone, args))
        for name, given in teacher_model.items()
    }
    _check_vocabularies(taught)
    return taught


def _loaded(teachers: Mapping[str, TeacherModel], alone: ModelPair, args: SwitchConfig) -> dict[str, LoadedTeacher]:
    """Those that are here, by name."""
    by_name = {name: each for name, each in teachers.items() if isinstance(each, str) and not is_address(each)}
    found = {
        name: each if isinstance(each, LoadedTeacher) else LoadedTeacher(each, None)
        for name, each in teachers.items()
        if not isinstance(each, str)
    }
    if by_name:
        place, kwargs = args.placement, args.placement.init_kwargs(loading_options(args))
        found |= load_teachers(
            by_name, alone.tokenizer, dtype=place.teacher_dtype, device=place.device, init_kwargs=kwargs
        )
    return found


def _remote(name: object, pair: ModelPair, args: SwitchConfig) -> RemoteTeacher | None:
    """The teacher at an address, checked to fit the pair's student; None for a name that is none, or that nothing asks."""
    signal = args.plan.teacher_signal
    if not is_address(name) or signal is None or not args.plan.needs_teacher:
        return None
    return RemoteTeacher(str(name), signal.top_k, pair.vocabulary_size, pair.tokenizer)


def _check_vocabularies(taught: Mapping[str, Taught]) -> None:
    """Raise UserError where the ids that student and teacher share are not the same ones with each teacher."""
    sizes = {name: each.pair.vocabulary_size for name, each in taught.items()}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{size:,} with {name}" for name, size in sizes.items())
        raise UserError(
            f"the teachers differ in the number of ids that they share with the student ({listed}), and one loss is over one "
            f"vocabulary; take teachers of one vocabulary"
        )


def check_several_teachers(args: SwitchConfig, teachers: Mapping[str, object]) -> None:
    """Raise UserError for names that are none, and for what a run with several teachers cannot do."""
    if not teachers:
        raise UserError("teachers is empty; give at least one, {NAME: model}, or leave it out")
    for name, each in teachers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            raise UserError(f"teachers has the name {str(name)[:70]!r}; take letters, digits, _, - and ., at most 64")
        if each is None:
            raise UserError(f"teachers names {name}, but no model for it; write {name}: MODEL")
        if each == SELF:
            raise UserError(
                f"the teacher {name} is {SELF!r}, the student without its adapter, which stands alone; give the name of the model "
                f"that the student starts from"
            )
    if not args.plan.needs_teacher:
        return
    if args.vllm is not None:
        raise UserError(
            "there are several teachers, but vllm writes with one; leave vllm out, or let servers of vLLM's be the teachers of a "
            "method whose text the student or the data writes (docs/vllm.md)"
        )
    if args.teacher_offload == "shared":
        raise UserError(
            "teacher_offload is 'shared', but there are several teachers, and the processes would ask for them in different "
            "orders; take cpu or disk"
        )
    if args.template_from == "teacher":
        raise UserError(
            "template_from is 'teacher', but there are several; take student, or the path of a template file"
        )
    addresses = [each for each in teachers.values() if is_address(each)]
    for address in addresses:
        check_remote_teacher(args, str(address), beside_loaded=len(addresses) < len(teachers))


def check_teacher_column(args: SwitchConfig) -> None:
    """Raise UserError for a column that nothing reads, since one teacher is there for all rows."""
    if args.teacher_column != SwitchConfig.teacher_column:
        raise UserError(
            f"teacher_column is {args.teacher_column!r}, but there is one teacher for all rows; set teachers, or leave it out"
        )


def first_pair(taught: Mapping[str, Taught]) -> ModelPair:
    """The pair of the first teacher, for all that is the student's alone."""
    return next(iter(taught.values())).pair


def named(taught: Mapping[str, Taught]) -> tuple[str, ...]:
    """The names of several teachers; empty where there is one for all."""
    return tuple(filter(None, taught))


def keep_ends(taught: Mapping[str, Taught]) -> None:
    """Write all ids that end a text into the student's generation config, and so into every save: it is served alone."""
    # All of them before the config is changed: the pairs read it.
    ends = dict.fromkeys(token_id for each in taught.values() for token_id in each.pair.eos_ids)
    student = base_of(first_pair(taught).student)
    if student.generation_config is not None and {*ends} - {*eos_ids_of(student, None)}:
        student.generation_config.eos_token_id = list(ends)
