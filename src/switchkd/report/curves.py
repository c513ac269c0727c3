"""The charts of a report, from the logs of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from switchkd.positions import BUCKET_NAMES

# More than a chart is wide.
_MOST_POINTS = 600

Event = Mapping[str, Any]


class Line(TypedDict):
    """A line of a chart: its name in the legend, and a value at each of its steps."""

    name: str
    steps: list[int]
    values: list[float]


class Chart(TypedDict):
    """A chart; `unit` is that of its values, and "share" means 0 to 1."""

    title: str
    unit: str
    lines: list[Line]


# Each as its title, its unit, and what is drawn: a measure of the log, and its name beside others in the same chart.
_CHARTS = (
    ("Loss", "nats a token", {"loss": ""}),
    ("Evaluation loss", "nats a token", {"eval_loss": ""}),
    ("Teacher's share of the tokens", "share", {"teacher_share": ""}),
    ("Response length", "tokens", {"response_tokens": ""}),
    ("Responses that ended by themselves", "share", {"ended": ""}),
    ("Speed", "tokens a second", {"rollout_tokens_per_second": "rollout", "train_tokens_per_second": "training"}),
)
_BY_POSITION = {f"divergence/{name}": f"tokens {name}" for name in BUCKET_NAMES}


def charts(logs: Mapping[str, Sequence[Event]]) -> list[Chart]:
    """The charts that there is something to draw in, given each run's log events by its name.

    A run is a line, or one for each of its stages. The divergence by position is a chart of its own for each run.
    """
    alone = len(logs) == 1
    found: list[Chart] = []
    for title, unit, measures in _CHARTS:
        lines = [line for run, events in logs.items() for line in _lines("" if alone else run, events, measures)]
        found.append({"title": title, "unit": unit, "lines": lines})
    for run, events in logs.items():
        title = "Divergence by position" + ("" if alone else f", {run}")
        found.append({"title": title, "unit": "nats", "lines": list(_lines("", events, _BY_POSITION))})
    return [chart for chart in found if chart["lines"]]


def _lines(run: str, events: Sequence[Event], measures: Mapping[str, str]) -> Iterator[Line]:
    stages = list(dict.fromkeys(str(event.get("stage") or "") for event in events))
    for measure, name in measures.items():
        for stage in stages:
            points = [
                (event["step"], float(event[measure]))
                for event in events
                if str(event.get("stage") or "") == stage
                and _is_number(event.get(measure))
                and _is_step(event.get("step"))
            ]
            if points:
                parts = (run, stage if len(stages) > 1 else "", name)
                yield _thinned(", ".join(part for part in parts if part) or measure, points)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _thinned(name: str, points: Sequence[tuple[int, float]]) -> Line:
    """The points, or means over equally many neighbors where there are more than a chart can show."""
    # The last event of a step stands for it, and a chart's steps rise.
    ordered = sorted(dict(points).items())
    size = math.ceil(len(ordered) / _MOST_POINTS)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    values = [math.fsum(value for _, value in group) / len(group) for group in groups]
    return {
        "name": name,
        "steps": [group[-1][0] for group in groups],
        "values": [float(f"{each:.5g}") for each in values],
    }
