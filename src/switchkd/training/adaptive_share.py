"""A student's share that rises where the student stops improving: DistiLLM's schedule from data to its own text."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.training.kept_state import kept_state

# Nats a token.
MARGIN = 0.1


class AdaptiveShare(TrainerCallback):
    """The share of sequences rolled out: `start`, and `rise` more (up to 1) after each evaluation that was worse.

    Worse is an eval_loss above the last one's by more than `MARGIN`.

    Source: Ko et al. 2024, DistiLLM, arXiv 2402.03898, section 3.2. We depart in that the loss is compared with the last
    evaluation's, and is the run's own objective, while the released code evaluates cross-entropy.
    """

    def __init__(self, start: float, rise: float) -> None:
        self.start = start
        self.rise = rise

    def share_at(self, state: TrainerState) -> float:
        """The share that is in force, 0 to 1."""
        return float(kept_state(state, "adaptive_share").get("share", self.start))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise the share where the loss is worse."""
        kept, metrics = kept_state(state, "adaptive_share"), kwargs["metrics"]
        # Several evaluation sets are evaluated one after the other: the first is the one that counts.
        name = kept.get("of", next((key for key in metrics if key.endswith("_loss")), None))
        loss = None if name is None else metrics.get(name)
        if loss is None:
            return
        share = self.share_at(state)
        if "loss" in kept and loss > kept["loss"] + MARGIN:
            share = min(1.0, share + self.rise)
        kept.update(share=share, of=name, loss=loss)
