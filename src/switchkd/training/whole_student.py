"""A student whose weights lie in parts on the processes (FSDP2, ZeRO-3), read whole where rollouts and saves need it.

Between the two, each process holds its part alone. What runs on the parts themselves is the training forward.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from switchkd.models.layers import linear_weights
from switchkd.models.pair import ModelPair
from switchkd.training.teachers import is_own_student, self_teacher

# What wrappers put into the names of parameters: activation checkpointing and torch.compile.
_OF_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")


class WholeStudent:
    """The pair as rollouts read it: `pair` is the given one, or, with `sharded`, one whose student is a copy.

    The copy has weights only inside `gathered()`, where they are those of the student at that moment. Under autocast those of
    linear layers are in its type, since they are read in no other; the rest are in their own. So the tokens are those of a
    student that is whole. What is saved is read inside `gathered_to_save()`, where all are in their own type. Make it before
    the student is taken apart.
    """

    def __init__(self, pair: ModelPair, *, sharded: bool) -> None:
        self.pair = self._trained = pair
        self._depth = 0
        if not sharded:
            return
        empty = {
            id(each): nn.Parameter(each.detach().new_empty(0), requires_grad=each.requires_grad)
            for each in pair.student.parameters()
        }
        student: PreTrainedModel = copy.deepcopy(pair.student, cast(dict[int, Any], empty))
        teacher = self_teacher(student) if is_own_student(pair.teacher) else pair.teacher
        self.pair = replace(pair, student=student, teacher=teacher, tokenizers_agree=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep whole weights in the copy inside; may be nested. All processes enter at the same time, or all wait."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._gather()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._release()

    @contextmanager
    def gathered_to_save(self, *, here: bool) -> Iterator[None]:
        """Keep whole weights in their own type in the copy inside, on the CPU, and only where `here`: the others are empty.

        All processes enter at the same time, inside `gathered()` or not.
        """
        before = [(parameter, parameter.data) for _, parameter in self._copied()]
        try:
            for parameter, gathered in self._whole_weights():
                # One at a time: a device with room for the rollouts' copy may have none for one of twice its size.
                parameter.data = gathered.cpu() if here else gathered.new_empty(0)
            yield
        finally:
            for parameter, data in before:
                parameter.data = data

    def _copied(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(()) if self.pair is self._trained else self.pair.student.named_parameters()

    def _whole_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The copy's parameters, each with the student's weight as it is now."""
        if self.pair is self._trained:
            return
        for module in self._trained.student.modules():
            if isinstance(module, FSDPModule):
                # Left whole after a forward, in the type that it computes in.
                module.reshard()
        parts = {_OF_WRAPPERS.sub("", name): each for name, each in self._trained.student.named_parameters()}
        for name, parameter in self._copied():
            yield parameter, whole(parts[name])

    def _gather(self) -> None:
        lowered = {id(each) for each in linear_weights(self.pair.student)} if self.pair.autocast_dtype else set()
        for parameter, gathered in self._whole_weights():
            # float64 is not lowered by autocast either.
            lower = id(parameter) in lowered and gathered.dtype == torch.float32
            parameter.data = gathered.to(self.pair.autocast_dtype) if lower else gathered

    def _release(self) -> None:
        for _, parameter in self._copied():
            parameter.data = parameter.data.new_empty(0)


class WholeHead:
    """The head of a student in parts under ZeRO-3, whole from the model's forward until the backward pass has its gradient.

    The model's own head runs inside the forward, and DeepSpeed takes it apart behind it; the objective reads it after that.
    FSDP2 keeps it by itself, and there, as without parts, nothing is done.
    """

    def __init__(self, head: nn.Module) -> None:
        self._parameters = [*head.parameters()]
        self._until: ExitStack | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Where a head that is `gather`ed inside ends. All processes enter at the same time."""
        with ExitStack() as until:
            self._until = until
            try:
                yield
            finally:
                self._until = None

    def gather(self) -> None:
        """Put the head together, if it is in parts and `kept`. All processes call it together."""
        if self._until is not None and any(map(_is_of_zero3, self._parameters)):
            self._until.enter_context(_gathered_by_deepspeed(self._parameters))


def _is_of_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def _gathered_by_deepspeed(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    # It is there where a parameter is its own.
    import deepspeed

    return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(parameters))


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each process holds a part, where it runs; any other as it is. All processes call it together."""
    if _is_of_zero3(tensor):
        with _gathered_by_deepspeed([cast(nn.Parameter, tensor)]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:
        # A part that is kept in the machine's memory; it travels between the devices.
        tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type))
    return tensor.full_tensor()


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, here: bool) -> dict[str, Any] | None:
    """The optimizer's state as one process would have it, on the CPU where `here`, else None. All processes call it together."""
    found, state = optimizer.state_dict(), {}
    for index, of_one in found["state"].items():
        state[index] = {key: _whole_value(value, here=here) for key, value in of_one.items()}
    return {**found, "state": state} if here else None


def _whole_value(value: Any, *, here: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    gathered = whole(value)
    # Kept by all, the state of a large model would fill a machine once for each of its devices.
    return gathered.cpu() if here else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Load a state that `whole_optimizer_state`, or one process, has saved; each process keeps its part, in memory of its own."""
    # The numbers of a state count the parameters through all groups.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: _part_as(parameters[index], value) for key, value in of_one.items()}
        for index, of_one in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})


def _part_as(parameter: Tensor, value: Any) -> Any:
    """The part of a tensor of the parameter's shape that this process holds of the parameter too; a copy."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.clone()
    value = value.to(parameter.device)
    # All have read the same file, so nothing is sent. It copies the part, and so keeps nothing of the rest.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
