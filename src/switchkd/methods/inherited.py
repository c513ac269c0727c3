"""Checks of single numbers, and of the settings of transformers that would fail late or in words of its code."""

from __future__ import annotations

import math
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from switchkd.errors import UserError

_AT_LEAST_1 = (
    "max_prompt_tokens",
    "rollout_rows",
    "rollout_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_AT_LEAST_0 = (
    "learning_rate",
    "measure_every",
    "show_rollouts_every",
    "weight_decay",
    "max_grad_norm",
    "adam_epsilon",
    "dataloader_num_workers",
    "warmup_steps",
    "eval_delay",
)
_ABOVE_0 = (
    *("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "save_total_limit"),
    *("max_seconds", "max_generated_tokens"),
)
RENAMED = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
_OF_TRANSFORMERS = {each.name: each for each in fields(TrainingArguments)}
_OF_LOGITS = ("include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches")
# What transformers' own loss, loader or evaluation reads, and ours does not; each with the reason.
_UNREAD = {
    "label_smoothing_factor": "the loss smooths no labels",
    "label_names": "rows are read by columns of their own (docs/data.md)",
    "average_tokens_across_devices": "the loss is divided by the tokens of all processes in any case",
    "hub_always_push": "each push to the hub waits for the one before it",
    "length_column_name": "sequences of like length share a forward in any case",
    **dict.fromkeys(
        (*_OF_LOGITS, "eval_use_gather_object"), "an evaluation keeps no logits (eval_scores scores answers)"
    ),
}
# The package that reports, where it has not the reporter's own name; TensorBoard's writer comes from either of two.
_REPORTERS = {"azure_ml": "azureml", "comet_ml": "comet_ml", "flyte": "flytekit", "kubeflow": "kubeflow"}
_TENSORBOARD = ("tensorboard", "tensorboardX")
# By a part of an optimizer's name.
_OPTIMIZERS = {
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
}
_INSTALLED_AS = {"optimi": "torch-optimi", "liger_kernel": "liger-kernel", "bitsandbytes": "'switchkd[quant]'"}


def check_inherited(args: TrainingArguments) -> None:
    """Raise UserError for numbers out of range, packages that are needed and not installed, and settings that nothing reads."""
    _check_ranges(args)
    _check_read(args)
    _check_packages(args)
    # From the launcher: the number of processes is known for sure only once the devices are taken.
    if args.fsdp and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(
            "fsdp is set, but there is one process, and nothing to spread; start several (torchrun --nproc-per-node N -m "
            "switchkd train ...), or leave it out"
        )


def _under_newer_name(name: str, sentence: str) -> Any:
    known = _OF_TRANSFORMERS.get(name)
    return field(default=None, metadata={"help": sentence} if known is None else dict(known.metadata))


@dataclass
class TransformersSettings(TrainingArguments):
    """The settings of transformers by their newest names, in every release that we run with.

    In older ones `activation_checkpointing` is called `gradient_checkpointing`; both names are taken.
    """

    activation_checkpointing: bool | None = _under_newer_name(
        "activation_checkpointing", "Compute activations again in the backward pass, to save memory."
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _under_newer_name(  # noqa: RUF009
        "activation_checkpointing_kwargs", "Keyword arguments of the model's activation checkpointing."
    )


def renamed(args: TransformersSettings) -> None:
    """Give older names of transformers' settings, which people still write, their newer ones."""
    for older, newer in RENAMED:
        if newer in _OF_TRANSFORMERS:
            if (given := getattr(args, older, None)) is not None:
                setattr(args, newer, given)
                setattr(args, older, None)
        elif (given := getattr(args, newer)) is not None:
            # This transformers reads the older name alone.
            setattr(args, older, given)
        else:
            setattr(args, newer, getattr(args, older))


def in_plain_words(message: str) -> str:
    """What transformers says about settings, as a run file writes them: `no` for IntervalStrategy.NO, no dashes, one line."""
    plain = re.sub(r"\b[A-Z]\w+\.([A-Z_]+)\b", lambda found: found[1].lower(), message)
    return " ".join(re.sub(r"(?<!\w)--(?=\w)", "", plain).split())


def _check_ranges(args: TrainingArguments) -> None:
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(
            f"max_steps is {args.max_steps}; it has to be at least 1, or left out, where num_train_epochs counts"
        )
    for keys, low, words in (
        (_AT_LEAST_1, 1, "at least 1"),
        (_AT_LEAST_0, 0, "0 or more"),
        (_ABOVE_0, math.nextafter(0, 1), "above 0"),
    ):
        for key in keys:
            if (value := getattr(args, key)) is not None and not low <= value < math.inf:
                raise UserError(f"{key} is {value}; it has to be {words}, or left out")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, key) < 1:
            raise UserError(f"{key} is {getattr(args, key)}; it has to be 0 or more and less than 1")
    for key in ("seed", "data_seed"):
        if (value := getattr(args, key)) is not None and not 0 <= value < 2**32:
            raise UserError(f"{key} is {value}; it has to be between 0 and {2**32 - 1:,}")


def _check_read(args: TrainingArguments) -> None:
    for key, reason in _UNREAD.items():
        known = _OF_TRANSFORMERS.get(key)
        if known is None:
            continue
        default = known.default if known.default_factory is MISSING else known.default_factory()
        if (value := getattr(args, key)) not in (None, default):
            raise UserError(f"{key} is {value}, but {reason}; leave it out")
    order = getattr(args, "train_sampling_strategy", "random")
    if order not in ("random", "sequential"):
        raise UserError(
            f"train_sampling_strategy is {order!r}, but sequences of like length share a forward in any case; take random or "
            f"sequential"
        )


def _check_packages(args: TrainingArguments) -> None:
    reporters: Any = args.report_to
    for name in [reporters] if isinstance(reporters, str) else reporters or ():
        _check_reporter(name)
    optimizer = str(getattr(args.optim, "value", args.optim))
    # The longest part says most: adamw_torch_8bit is torchao's, though it ends in 8bit.
    if parts := sorted((part for part in _OPTIMIZERS if part in optimizer), key=len):
        _check_installed(f"optim is {optimizer!r}", _OPTIMIZERS[parts[-1]])
    if args.deepspeed:
        _check_installed(f"deepspeed is {args.deepspeed!r}", "deepspeed")
        if isinstance(args.deepspeed, str) and not Path(args.deepspeed).is_file():
            raise UserError(f"deepspeed is {args.deepspeed!r}, but there is no such file; check the path")
    if args.use_liger_kernel:
        _check_installed("use_liger_kernel is true", "liger_kernel")


def _check_reporter(name: str) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise UserError(f"report_to is {name!r}; choose of none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    if name == "tensorboard" and any(map(find_spec, _TENSORBOARD)):
        return
    _check_installed(f"report_to is {name!r}", _REPORTERS.get(name, name))


def _check_installed(given: str, package: str) -> None:
    if find_spec(package) is None:
        raise UserError(
            f"{given}, but the package {package} is not installed; pip install {_INSTALLED_AS.get(package, package)}, or "
            f"leave it out"
        )
