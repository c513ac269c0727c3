"""What parts of the trainer keep in its state, and so in every checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import TrainerState


def kept_state(state: TrainerState, owner: str) -> dict[str, Any]:
    """The JSON values that `owner` keeps: empty in a new run, as they were in a resumed one. Change them in place."""
    # Not an ExportableState: transformers 5.23 restores one on request alone, and then by making a second object.
    by_name: Any = state.stateful_callbacks
    values: dict[str, Any] = by_name.setdefault("switchkd", {}).setdefault(owner, {})
    return values
