"""What a trainer asks of its machine: one device a process, sharding that is right, and a precision in which weights move."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.rollout.graphs import Compile, weights_stay

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of each weight tensor, enough for a share to a percent.
_WEIGHTS_LOOKED_AT = 4096


def autocast_dtype_of(args: TrainingArguments) -> torch.dtype | None:
    """The type that bf16, fp16 or accelerate's own setting asks to compute in, or None for the weights' own."""
    return _AUTOCAST_DTYPES.get(str(args.mixed_precision))


def is_spread(model: PreTrainedModel) -> bool:
    """Whether a device_map put the parts of a model in several places."""
    return len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1


def _gpus_of(model: PreTrainedModel, device: torch.device) -> set[int]:
    """The numbers of the GPUs that a model is on: where its device_map put it, or else on the process's own device."""
    places = {*(getattr(model, "hf_device_map", None) or {"": device}).values()} - {"disk"}
    devices = [torch.device("cuda", each) if isinstance(each, int) else torch.device(each) for each in places]
    return {each.index or 0 for each in devices if each.type == "cuda"}


def check_one_device(args: TrainingArguments, pairs: Iterable[ModelPair]) -> None:
    """Raise UserError where transformers would copy the student to all GPUs of one process (nn.DataParallel)."""
    if args.n_gpu <= 1:
        return
    models = [model for pair in pairs for model in pair.models.values()]
    if any(map(is_spread, models)) or len({gpu for each in models for gpu in _gpus_of(each, args.device)}) > 1:
        # The GPUs are there for the models that are spread over them.
        args._n_gpu = 1
        return
    raise UserError(
        f"one process sees {args.n_gpu} GPUs, but each GPU needs a process of its own; start the run with torchrun "
        f"--nproc-per-node {args.n_gpu} -m switchkd train ... (or accelerate launch), or show it one GPU: "
        f"CUDA_VISIBLE_DEVICES=0"
    )


def set_up_sharding(accelerator: Accelerator, args: TrainingArguments) -> bool:
    """Set FSDP2 up as the objective needs it, where it was asked for, on CPUs too; says whether it is on."""
    state = accelerator.state
    asked = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        # torch has it there, but accelerate passes it over.
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        return False
    if isinstance(policy := state.fsdp_plugin.mixed_precision_policy, MixedPrecisionPolicy):
        # Summed over processes in float32, as without FSDP.
        state.fsdp_plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
    # Else the gradients of a step's forwards would pile up whole on every process.
    accelerator.gradient_state.plugin_kwargs.setdefault("sync_each_batch", True)
    return True


def compile_of(pair: ModelPair, args: SwitchConfig, *, in_parts: bool) -> Compile:
    """`compile` as the engine takes it. Raises UserError where graphs were asked for and weights do not stay where they are."""
    # A teacher that is its own student has no weights to move.
    has_weights = pair.teacher is not None and next(pair.teacher.parameters(), None) is not None
    if weights_stay(in_parts=in_parts, teacher_offload=args.teacher_offload if has_weights else "none"):
        return args.compile
    if args.compile is True:
        of = (
            "a student in parts (FSDP, ZeRO-3)"
            if in_parts
            else f"a teacher with teacher_offload: {args.teacher_offload}"
        )
        raise UserError(
            f"compile is true, but a graph needs weights that stay where they are, and those of {of} do not; set compile: auto"
        )
    return False


def sharding_of(state: AcceleratorState) -> Literal["FSDP", "ZeRO-3"] | None:
    """What takes the student's weights apart, if anything does: ZeRO 1 and 2 do so with optimizer state and gradients alone."""
    if state.distributed_type == DistributedType.FSDP:
        return "FSDP"
    zero3 = state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3
    return "ZeRO-3" if zero3 else None


def check_sharding(state: AcceleratorState, args: SwitchConfig, pair: ModelPair, *, teachers: int = 1) -> None:
    """Raise UserError for a way to spread the student's weights, or its texts, that would fail late, or train something else."""
    spread = getattr(state, "parallelism_config", None)
    if spread is not None and (spread.cp_enabled or spread.sp_enabled):
        raise UserError(
            f"parallelism_config takes texts apart (cp_size {spread.cp_size}, sp_size {spread.sp_size}), but the loss needs them "
            f"whole; set both to 1"
        )
    kind = sharding_of(state)
    if kind is None:
        return
    if teachers > 1:
        raise UserError(
            f"the student is in parts ({kind}), and there are several teachers, whose texts the processes read in different "
            f"orders; use plain data parallelism (torchrun --nproc-per-node N), or one teacher"
        )
    if kind == "FSDP":
        _check_fsdp(state.fsdp_plugin)
    elif any(hasattr(each, "ds_id") for model in pair.models.values() for each in model.parameters()):
        raise UserError(
            "DeepSpeed took the models apart while they were loaded, but the student's head is proven, and the teacher is read, "
            "whole; give their names, or load them before any settings that name DeepSpeed are made"
        )
    if args.load_best_model_at_end:
        raise UserError(
            f"load_best_model_at_end is true, but a student in parts ({kind}) takes no weights while it trains; leave it out, and "
            f"take the best checkpoint's folder yourself"
        )
    if args.plan.objective.needs_start and hasattr(pair.student, "disable_adapter"):
        raise UserError(
            f"start_weight and target: extrapolated look back at the student without its adapter, and an adapter's student in "
            f"parts ({kind}) cannot be read so; leave peft out, or use plain data parallelism (torchrun --nproc-per-node N)"
        )
    if getattr(pair.student, "is_quantized", False):
        raise UserError(
            f"the student is quantized, and {kind} cannot take packed weights apart exactly; leave student_quantization out, or "
            f"use plain data parallelism (torchrun --nproc-per-node N)"
        )


def _check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    if plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp_version is {plugin.fsdp_version}, whose flat parameters the loss cannot read; set fsdp_version: 2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading is true, so that only the first process would read the models' weights, the "
            "teacher's too; set it to false"
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
