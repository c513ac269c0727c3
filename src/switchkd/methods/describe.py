"""A run's objective in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from switchkd.distributions.divergences import DIVERGENCE, Divergence
from switchkd.methods.config import SwitchConfig
from switchkd.rollout.policies import POLICY, Switch


def describe_objective(config: SwitchConfig) -> str:
    """Learning rate, what is minimized and who writes, for the first line of a run; the threshold at both ends, in nats."""
    objective = config.plan.objective
    divergence = objective.divergence
    compared = [_in_words(DIVERGENCE.describe(divergence))] if isinstance(divergence, Divergence) else []
    if weight := objective.cross_entropy_weight:
        on = f" on {objective.cross_entropy_on} text" if config.plan.rolls_out else ""
        compared.append(("cross-entropy" if weight == 1 else f"{weight:g} x cross-entropy") + on)
    rate = [] if config.learning_rate is None else [f"learning rate {config.learning_rate:g}"]
    said = [*rate, " + ".join(compared)]
    return ", ".join([*said, _writer(config)] if config.plan.rolls_out else said)


def _writer(config: SwitchConfig) -> str:
    policy, auto, tokens = config.plan.policy, config.plan.auto_threshold, config.max_new_tokens
    if auto is not None:
        return f"threshold for {auto.teacher_share:.0%} teacher tokens"
    if not isinstance(policy, Switch):
        return f"policy {_in_words(POLICY.describe(policy))}"
    first, last = policy.thresholds(torch.tensor([0, tokens - 1]), tokens).tolist()
    return f"threshold {first:.3g}" + (f" falling to {last:.3g}" if last != first else "")


def _in_words(part: Mapping[str, Any]) -> str:
    """A part's name and, in brackets, the settings that are not left open."""
    settings = [f"{key} {value}" for key, value in part.items() if key != "name" and value is not None]
    return str(part["name"]) + (f" ({', '.join(settings)})" if settings else "")
