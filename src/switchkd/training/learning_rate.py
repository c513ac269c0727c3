"""The learning rate that suits what is trained, and a word where a given one is far from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from switchkd.models.pair import parameter_count


@dataclass(frozen=True)
class UsualRates:
    """What a kind of student is trained at: the rate where none is given, and the bounds of what is usual."""

    kind: str
    default: float
    low: float
    high: float


# Defaults as in TRL's and tinker-cookbook's pages for adapters, and in ms-swift's examples for whole models. Bounds are ours: the
# recipes for GPT-2 go up to 5e-4, and TRL's own default for distillation is 1e-6. The small one is that of the embedded pair.
ADAPTER = UsualRates("an adapter", 2e-4, 2e-5, 5e-3)
SMALL = UsualRates("a model of under 30M parameters", 1e-3, 1e-5, 2e-2)
WHOLE = UsualRates("a whole model", 1e-5, 1e-7, 1e-3)
_SMALL_PARAMETERS = 30_000_000


def usual_rates(student: nn.Module) -> UsualRates:
    """The usual rates of a student's kind: an adapter of any size, or a small or large model."""
    if hasattr(student, "peft_config"):
        return ADAPTER
    return SMALL if parameter_count(student) < _SMALL_PARAMETERS else WHOLE


def learning_rate_for(student: nn.Module, given: float | None) -> float:
    """The given rate, or the usual one where there is none; warns of one that is far from the usual ones."""
    usual = usual_rates(student)
    if given is None:
        return usual.default
    if given and not usual.low <= given <= usual.high:
        logging.getLogger(__name__).warning(
            f"learning_rate is {given:g}, but {usual.kind} is usually trained at {usual.low:g} to {usual.high:g}: it may "
            f"{'hardly learn' if given < usual.low else 'diverge'}; left out, it is {usual.default:g}"
        )
    return given
