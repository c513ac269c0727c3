"""A run's objective in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from switchkd.distributions.divergences import DIVERGENCE, Divergence
from switchkd.loss.targets import OF_TEACHER, TARGET
from switchkd.loss.weights import WEIGHT
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import Plan
from switchkd.rollout.policies import POLICY, Switch


def describe_objective(config: SwitchConfig) -> str:
    """Learning rate, what is minimized and who writes, for the first line of a run; the threshold at both ends, in nats."""
    objective = config.plan.objective
    divergence = objective.divergence
    compared = [_in_words(DIVERGENCE.describe(divergence))] if isinstance(divergence, Divergence) else []
    if objective.target != OF_TEACHER:
        compared[0] += f" to {_in_words(TARGET.describe(objective.target))}"
    if objective.start_weight and isinstance(objective.start_divergence, Divergence):
        compared.append(
            f"{objective.start_weight:g} x {_in_words(DIVERGENCE.describe(objective.start_divergence))} to the start"
        )
    if weight := objective.cross_entropy_weight:
        on = f" on {objective.cross_entropy_on} text" if config.plan.rolls_out else ""
        compared.append(("cross-entropy" if weight == 1 else f"{weight:g} x cross-entropy") + on)
    rate = [] if config.learning_rate is None else [f"learning rate {config.learning_rate:g}"]
    said = [*rate, " + ".join(compared)]
    said += [f"weight {_in_words(WEIGHT.describe(weight))}" for weight in objective.weights]
    return ", ".join([*said, _writer(config), *_texts(config.plan)] if config.plan.rolls_out else said)


def _texts(plan: Plan) -> list[str]:
    """What is unusual about how rollouts start, grow or are rewritten."""
    said = []
    if begin := plan.replayed_prefix:
        said.append(
            f"rollouts begin with part of the {'teacher' if begin.source == 'teacher' else 'data set'}'s response"
        )
    if plan.length_growth:
        said.append(f"at most {plan.length_growth.start} tokens long at first")
    if plan.rewrite:
        said.append("rewritten by the teacher")
    return said


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
