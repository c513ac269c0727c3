"""What a trainer asks of its machine: one device a process, whole weights, and a precision in which the weights move."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from switchkd.errors import UserError
from switchkd.models.pair import ModelPair

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of each weight tensor, enough for a share to a percent.
_WEIGHTS_LOOKED_AT = 4096


def autocast_dtype_of(args: TrainingArguments) -> torch.dtype | None:
    """The type that bf16, fp16 or accelerate's own setting asks to compute in, or None for the weights' own."""
    return _AUTOCAST_DTYPES.get(str(args.mixed_precision))


def is_spread(model: PreTrainedModel) -> bool:
    """Whether a device_map put the parts of a model in several places."""
    return len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1


def check_one_device(args: TrainingArguments, pair: ModelPair) -> None:
    """Raise UserError where transformers would copy the student to all GPUs of one process (nn.DataParallel)."""
    if args.n_gpu <= 1:
        return
    if any(is_spread(model) for model in pair.models.values()):
        # The GPUs are there for the model that is spread over them.
        args._n_gpu = 1
        return
    raise UserError(
        f"one process sees {args.n_gpu} GPUs, but each GPU needs a process of its own; start the run with torchrun "
        f"--nproc-per-node {args.n_gpu} -m switchkd train ... (or accelerate launch), or show it one GPU: "
        f"CUDA_VISIBLE_DEVICES=0"
    )


def check_whole_weights(state: AcceleratorState) -> None:
    """Raise UserError where a process has a part of the weights only: the objective and rollouts read them whole."""
    sharding = "FSDP" if state.distributed_type == DistributedType.FSDP else None
    # ZeRO 1 and 2 take apart the optimizer's state and the gradients alone.
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        sharding = "DeepSpeed ZeRO-3"
    if sharding:
        raise UserError(
            f"every process needs whole weights, for the loss as for rollouts, but {sharding} leaves each with a part of them; "
            f"use plain data parallelism (torchrun --nproc-per-node N), DeepSpeed ZeRO-1 or ZeRO-2, or an adapter (peft)"
        )


def warn_if_weights_stand_still(student: PreTrainedModel, args: TrainingArguments) -> None:
    """Warn where AdamW's step, about the learning rate, is lost in the rounding of most trainable weights."""
    if not args.optim.startswith("adamw_torch") or not args.learning_rate:
        return
    still = [(_half_spacing(part) > args.learning_rate).float() for part in _low_precision_weights(student)]
    share = float(torch.cat(still).mean()) if still else 0.0
    if share > 0.5:
        warnings.warn(
            f"at learning_rate {args.learning_rate:g}, a step is rounded away at {share:.0%} of the student's weights, "
            f"since they are kept in 16 bits; keep them in float32 and compute in bfloat16 (precision: auto on a GPU, or "
            f"bf16: true)",
            stacklevel=2,
        )


def _low_precision_weights(student: PreTrainedModel) -> Iterator[Tensor]:
    """A sample of each trainable weight that is kept in 16 bits."""
    for parameter in student.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16) and parameter.numel():
            stride = max(1, parameter.numel() // _WEIGHTS_LOOKED_AT)
            yield parameter.detach().flatten()[::stride].cpu()


def _half_spacing(weights: Tensor) -> Tensor:
    """Half the distance from each weight to the next that its type can hold; a smaller step is rounded away."""
    exponent = torch.frexp(weights.float()).exponent - 1
    half = torch.ldexp(torch.full_like(exponent, torch.finfo(weights.dtype).eps / 2, dtype=torch.float32), exponent)
    # Any step leaves 0.
    return half * (weights != 0)
