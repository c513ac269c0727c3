"""Plots of a run, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CURVES = {"loss": "loss (nats a token)", "teacher_share": "share of tokens written by the teacher"}


def save_curves(events: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw loss and teacher share over the steps of all stages into a PNG file, and return its path.

    `events` are those of the run's log. Returns None where matplotlib is missing or there is nothing to draw.
    """
    steps = [event for event in events if "loss" in event]
    if not steps or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    shown = [key for key in CURVES if any(key in event for event in steps)]
    figure = Figure(figsize=(4.5 * len(shown), 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, key in zip(axes, shown, strict=True):
        for stage in dict.fromkeys(event["stage"] for event in steps):
            points = [(event["step"], event[key]) for event in steps if event["stage"] == stage and key in event]
            if points:
                axis.plot(*zip(*points, strict=True), label=stage or None)
        axis.set(xlabel="step", ylabel=CURVES[key])
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    figure.savefig(path, dpi=120)
    return path
