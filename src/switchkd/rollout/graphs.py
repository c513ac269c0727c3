"""The draft loop as graphs of the device: which functions are compiled, when, and what happens where they cannot be.

On CUDA a graph has fixed shapes, so rows are padded to a fixed number and widths come in buckets. On a CPU one graph serves any
number of rows, any width and any block of two tokens or more. Weights change in place from step to step, and the graph reads them
where they are; large ones of a frozen teacher on a CPU are packed into the graph.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from switchkd.distributions.draw import Draft
from switchkd.distributions.noise import Address, gumbel
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.rollout.block import scored, student_step, teacher_states, written
from switchkd.rollout.law import Blend, Decision

Compile = Literal["auto", True, False]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Of the fixed widths; narrower ones cost a graph each, and save little.
_NARROWEST = 256
# Widths by doubling, times block sizes, times models of one process; torch itself stops at 8.
_MOST_GRAPHS = 256
# Weights are packed if they hold this many numbers on average. With 8 rows oneDNN multiplies by a packed weight of 640 x 1,920 in
# 0.7 of a plain one's time, but by one of 96 x 96 in 5 times of it: a call costs 20 microseconds more (AVX2, one thread).
_LARGE_WEIGHT = 1 << 18
# The noise's hash uses each value twice. Torch computes a value again at each use unless it has more operations than this; at
# torch's own 30 a draw takes twelve times as long. Loops are joined again afterwards.
_MOST_OPERATIONS = 4
_states = itertools.count()


def check_compile(compile: Compile) -> None:
    """Raise UserError for anything but true, false and auto."""
    if compile not in (True, False, "auto"):
        raise UserError(f"compile is {compile!r}; give true, false or auto (true on CUDA)")


def compiles(compile: Compile, device: torch.device) -> bool:
    """Whether the draft loop is compiled. "auto" goes by the kind of device alone, so that equal runs stay equal."""
    return device.type == "cuda" if compile == "auto" else bool(compile)


def bucket(least: int) -> int:
    """The smallest power of two that is at least `least`, and at least 256."""
    return max(_NARROWEST, 1 << (least - 1).bit_length())


@contextmanager
def many_graphs() -> Iterator[None]:
    """Room for a graph of every shape; torch's own limit would stop at a few."""
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=4 * _MOST_GRAPHS):
        yield


def weights_stay(*, in_parts: bool, teacher_offload: str) -> bool:
    """Whether weights stay where they are, as a graph needs them: not those of a student in parts, or of a teacher that moves."""
    return not in_parts and teacher_offload == "none"


class Graph(Generic[_P, _R]):
    """A function of tensors, compiled for each new shape at its first call; run as it is, after a warning, where that fails.

    `packs_weights` compiles a frozen model's weights into the graph, in the order that a CPU multiplies fastest.
    """

    def __init__(self, function: Callable[_P, _R], device: torch.device, *, packs_weights: bool = False) -> None:
        self.function = function
        self.on_cuda = device.type == "cuda"
        self.packs_weights = packs_weights
        self._checked: set[Hashable] = set()
        self.compiled: Callable[_P, _R] | None = torch.compile(
            function, fullgraph=True, dynamic=False, mode="reduce-overhead" if self.on_cuda else None
        )

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """What the function returns."""
        if self.compiled is None:
            return self.function(*args, **kwargs)
        try:
            return self._run(self.compiled, *args, **kwargs)
        except _cannot_compile() as error:
            self.compiled = None
            # The first line may only name the backend.
            reason = " ".join(str(error).strip().split("\n")[:2])
            warnings.warn(
                f"rollouts run {self.function.__name__} uncompiled, since torch cannot compile it here ({reason}); "
                f"set compile: false, or on a CPU install a C++ compiler",
                stacklevel=2,
            )
            return self.function(*args, **kwargs)

    def forget(self) -> None:
        """Check again: the models may change between two calls to `generate`, and their caches stay alive with what was checked."""
        self._checked.clear()

    def _run(self, compiled: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        seen = self._seen(args)
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        if seen in self._checked:
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                result = compiled(*args, **kwargs)
        else:
            from torch._inductor import config

            how = (
                {} if self.on_cuda else {"freezing": self.packs_weights, "realize_opcount_threshold": _MOST_OPERATIONS}
            )
            with config.patch(how):
                result = compiled(*args, **kwargs)
            self._checked.add(seen)
        # A CUDA graph writes its results to the same memory each time.
        return cast(_R, tree_map_only(Tensor, torch.clone, result)) if self.on_cuda else result

    def _seen(self, value: object) -> Hashable:
        """What of its arguments a graph is made for: all but the numbers in tensors and, on a CPU, their first two sizes.

        Torch checks a thousand things of the models before it runs a graph, which takes longer than a small model's step. Within a
        call to `generate` nothing else changes, so it checks the first time alone.
        """
        if isinstance(value, Tensor):
            if self.on_cuda:
                return value.dtype, value.shape
            # Rows or slots, and the positions of a block. Torch makes a graph of its own for a single one in any case, and for
            # tensors that begin where their memory does.
            several = tuple(size > 1 for size in value.shape[:2])
            for dimension, open_ended in enumerate(several):
                if open_ended:
                    torch._dynamo.mark_dynamic(value, dimension)
            return value.dtype, several, value.shape[2:], value.storage_offset() > 1
        # Each block makes new records. As they are, none would equal an earlier one, and all would be kept in memory.
        if isinstance(value, (Draft, Address, Decision, Blend)):
            value = tuple(vars(value).values())
        return tuple(map(self._seen, value)) if isinstance(value, tuple) else value


@cache
def _cannot_compile() -> tuple[type[Exception], ...]:
    # Imported where it is needed: it takes a second.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    # The last is a model whose code fixes the number of rows or slots.
    return (
        TorchDynamoException,
        FailOnRecompileLimitHit,
        CppCompileError,
        InvalidCxxCompiler,
        ConstraintViolationError,
    )


class _Weights:
    """Numbers the states that a model's weights have been in: packed ones are compiled again when theirs have changed.

    No two models share a number. A graph takes it for an argument, and so is made for one state of one model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: tuple[Any, ...] | None = None
        self._number = 0

    def number(self) -> int:
        """The number of the state they are in now."""
        seen = tuple((each.data_ptr(), each._version) for each in self.model.parameters())
        if seen != self._seen:
            self._seen, self._number = seen, next(_states)
        return self._number


def _worth_packing(teacher: nn.Module, trained: set[int]) -> bool:
    """Whether a teacher's weights are large enough, and none of them is one of `trained` (by address)."""
    weights = [each for each in teacher.parameters() if each.ndim > 1]
    large = sum(each.numel() for each in weights) >= _LARGE_WEIGHT * len(weights)
    return large and not any(each.data_ptr() in trained for each in weights)


class Graphs:
    """The graphs of a pair, kept from call to call."""

    def __init__(self, pair: ModelPair) -> None:
        self.shapes: Literal["fixed", "open"] = "fixed" if pair.student.device.type == "cuda" else "open"
        device, trained = pair.student.device, {each.data_ptr() for each in pair.student.parameters()}
        # A teacher that is its own student, without an adapter or with another, has weights that train.
        packs = device.type == "cpu" and pair.teacher is not None
        packs = packs and _worth_packing(cast(nn.Module, pair.teacher), trained)
        self._weights = _Weights(cast(nn.Module, pair.teacher)) if packs else None
        self.student_step = Graph(student_step, device)
        self.teacher_states = Graph(teacher_states, device, packs_weights=packs)
        self.scored = Graph(scored, device, packs_weights=packs)
        self.noise = Graph(gumbel, device)
        # Not on a CPU, where torch 2.13's code of it ended in a segmentation fault (float64; tests/test_graphs.py).
        self.written = Graph(written, device) if device.type == "cuda" else partial(written, noise=self.noise)

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call to `generate`: what torch has checked holds inside alone."""
        try:
            with many_graphs():
                yield
        finally:
            for each in vars(self).values():
                if isinstance(each, Graph):
                    each.forget()

    def width(self, least: int, slots: int) -> int | Tensor:
        """How many of a cache's slots a graph looks at, where it has to see `least`; see `Reading`."""
        return min(bucket(least), slots) if self.shapes == "fixed" else torch.empty(least, dtype=torch.bool)

    def rows(self, most: int) -> tuple[int, int]:
        """How many rows a graph computes at least, those that hold nothing too, and how many a cache has, for `most` in flight."""
        if self.shapes == "fixed":
            return (padded := 1 << (most - 1).bit_length()), padded
        # Torch makes a graph of its own for a single row, and for a number that can be no other.
        return min(most, 2), most + 1

    def weights(self) -> int:
        """The number of the state of the teacher's packed weights; 0 where graphs read them where they are."""
        return 0 if self._weights is None else self._weights.number()
