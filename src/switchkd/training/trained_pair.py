"""The pair that a trainer trains, made of what its user gave: names or models, an adapter, the student as its own teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.chat import set_template
from switchkd.models.load import load_model, load_tokenizer, revision_in
from switchkd.models.pair import ModelPair
from switchkd.training.machine import autocast_dtype_of
from switchkd.training.teachers import SELF, loading_options, self_teacher

if TYPE_CHECKING:
    from peft import PeftConfig


def trained_pair(
    model: ModelPair | PreTrainedModel | str,
    teacher_model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: SwitchConfig,
) -> ModelPair:
    """The pair, with names loaded and the student adapted where there is a `peft_config`.

    `model` is the student or a pair; "self" as teacher is the student without its adapter. Without a `tokenizer`, the student's
    name gives it. It computes in the precision that `args` ask for, or else in a given pair's. Raises UserError for parts that
    do not fit.
    """
    autocast_dtype = autocast_dtype_of(args)
    if isinstance(model, ModelPair):
        if tokenizer is not None or not (teacher_model is None or (teacher_model == SELF and model.teacher is None)):
            raise UserError(
                "model is a pair, with a teacher and a tokenizer; leave teacher_model and processing_class out"
            )
        autocast_dtype = autocast_dtype or model.autocast_dtype
        kept = autocast_dtype == model.autocast_dtype and args.template_from == "student"
        if peft_config is None and teacher_model is None and kept:
            # Its heads may have been proven already.
            _check_trainable(model.student)
            return model
        teacher_model, tokenizer = teacher_model or model.teacher, model.tokenizer
        student, teacher_tokenizer = model.student, model.teacher_tokenizer
    else:
        # A model that was made on the spot has no name, and needs no tokenizer for data that is token ids.
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        tokenizer = _tokenizer(name, args.model_init_kwargs) if tokenizer is None else tokenizer
        named = teacher_model if isinstance(teacher_model, str) and teacher_model != SELF else None
        teacher_tokenizer = _tokenizer(named, args.teacher_model_init_kwargs)
        place, kwargs = args.placement, args.placement.init_kwargs(args.model_init_kwargs)
        student = (
            load_model(model, dtype=place.student_dtype, device=place.device, init_kwargs=kwargs)
            if isinstance(model, str)
            else model
        )
    if tokenizer is not None:
        set_template(tokenizer, teacher_tokenizer, args.template_from)
    if peft_config is not None:
        student = _adapted(student, peft_config, args)
    _check_trainable(student)
    teacher = self_teacher(student) if teacher_model == SELF else teacher_model
    if isinstance(teacher, str):
        place, kwargs = args.placement, args.placement.init_kwargs(loading_options(args))
        teacher = load_model(teacher, dtype=place.teacher_dtype, device=place.device, init_kwargs=kwargs)
    return ModelPair(student, teacher, tokenizer, teacher_tokenizer, autocast_dtype)


def _tokenizer(name: str | None, init_kwargs: Mapping[str, Any] | None) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(name, revision=revision_in(init_kwargs)) if name else None


def _check_trainable(student: PreTrainedModel) -> None:
    if not any(each.requires_grad for each in student.parameters()):
        raise UserError(
            "nothing of the student can be trained: its weights are frozen, as those of an adapter's folder are; merge the adapter "
            "into its model first (adapter: merge does so at a run's end)"
        )


def _adapted(student: PreTrainedModel, peft_config: PeftConfig, args: SwitchConfig) -> PreTrainedModel:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(student, "_hf_peft_config_loaded", False):
        # PEFT would begin the adapter that is there at random again, and train from the bare model.
        raise UserError(
            "the student is an adapter's folder, and peft would replace that adapter; merge it into its model first, or leave "
            "peft out of the run that made it"
        )
    if getattr(student, "is_quantized", False):
        student = prepare_model_for_kbit_training(student, use_gradient_checkpointing=args.activation_checkpointing)
    # An adapter begins at random, and equal runs begin equally.
    set_seed(args.seed)
    return cast(PreTrainedModel, get_peft_model(student, peft_config))
