"""Plots, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.analysis.calibration import Calibration
from switchkd.analysis.diagnosis import TextDiagnosis
from switchkd.files import replacing
from switchkd.positions import ByPosition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_PLOT = "no plot was drawn, since matplotlib is not installed: pip install 'switchkd[plot]'"

CURVES = {"loss": "loss (nats per token)", "teacher_share": "share of tokens written by the teacher"}


def save_curves(events: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw loss and teacher share over the steps of all stages, given the events of the run's log, into a PNG file.

    Return its path, or None where matplotlib is missing or there is nothing to draw.
    """
    steps = [event for event in events if "loss" in event]
    if not steps or find_spec("matplotlib") is None:
        return None
    # Not pyplot: a figure of its own neither looks for a display nor stays in memory.
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
    return _save(figure, path)


def save_calibration(calibration: Calibration, path: Path) -> Path | None:
    """Draw divergence and threshold, teacher share, and rows by position into a PNG file.

    Return its path, or None where matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        return None
    figure, (left, middle, right) = _panels(3)
    _draw_curve(left, calibration.divergence, "divergence, mean", "C0")
    left.plot(calibration.threshold, label="threshold", color="C1")
    left.set(ylabel="nats", yscale="log", title="divergence and threshold")
    left.legend()
    _draw_curve(middle, calibration.teacher_share, "by position", "C0")
    wanted = calibration.wanted_share
    middle.axhline(wanted, color="C1", label=f"wanted over all tokens: {wanted:.0%}")
    middle.set(ylim=(0, 1), title="share written by the teacher")
    middle.legend()
    _draw_rows(right, {"": calibration.divergence.rows})
    return _save(figure, path)


def save_diagnosis(texts: Mapping[str, TextDiagnosis], path: Path) -> Path | None:
    """Draw perplexity, divergence, entropy and rows by position, one line per text, into a PNG file.

    Return its path, or None where matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        return None
    figure, axes = _panels(4)
    for index, (name, text) in enumerate(texts.items()):
        perplexity = ByPosition(text.perplexity, text.log_perplexity.rows)
        for axis, curve in zip(axes, (perplexity, text.divergence, text.entropy), strict=False):
            # Narrow lines over wide ones: where SWITCH's text is the teacher's, both lines still have to be seen.
            _draw_curve(axis, curve, name, f"C{index}", width=1 + 0.7 * (len(texts) - 1 - index))
    titles = ("teacher's perplexity of the text so far", "divergence (nats)", "teacher's entropy (nats)")
    for axis, title in zip(axes, titles, strict=False):
        axis.set(title=title)
    axes[0].set(yscale="log")
    for formatted in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes[0].legend(title="text by")
    _draw_rows(axes[3], {name: text.divergence.rows for name, text in texts.items()})
    return _save(figure, path)


def save_scores(
    scores: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], label: str, path: Path
) -> Path | None:
    """Draw scores and intervals into a PNG file: a row of panels for each set, a panel for each part, a line for each method.

    `scores` are (mean, low, high) by set, method and part; bounds may be NaN. Return the path, or None without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    parts = [list(next(iter(methods.values()))) for methods in scores.values()]
    most, lines = max(map(len, parts)), sum(map(len, scores.values()))
    figure = Figure(figsize=(2.0 + 2.2 * most, 1.1 * len(scores) + 0.22 * lines), layout="constrained")
    grid = figure.subplots(len(scores), most, squeeze=False, sharey="row")
    for axes, of_set, (name, methods) in zip(grid, parts, scores.items(), strict=True):
        for number, axis in enumerate(axes):
            if number >= len(of_set):
                axis.set_visible(False)
                continue
            found = [of_part[of_set[number]] for of_part in methods.values()]
            means, lengths = _with_lengths(found)
            axis.errorbar(means, range(len(means)), xerr=lengths, fmt="o", color="C0", capsize=2)
            axis.set(title=f"{name}: {of_set[number]}", xlabel=label)
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_yticks(range(len(methods)), list(methods))
        axes[0].invert_yaxis()
    return _save(figure, path)


def save_demo(
    scores: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str, teacher_share: ByPosition, path: Path
) -> Path | None:
    """Draw exact match by method and part, (mean, low, high), and the teacher's share of SWITCH's text into a PNG file.

    Return its path, or None where matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_scores(left, scores)
    left.set(title="exact match, by length of the answer", ylabel=label)
    left.legend(fontsize="small")
    _draw_curve(right, teacher_share, "", "C0")
    right.set(ylim=(0, None), title="share written by the teacher", xlabel="position in the response (tokens)")
    return _save(figure, path)


def _draw_scores(axis: Axes, methods: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """A point with its interval for each method, (mean, low, high), side by side in a group for each part."""
    parts = list(next(iter(methods.values())))
    for number, (method, of_part) in enumerate(methods.items()):
        beside = 0.7 * ((number + 0.5) / len(methods) - 0.5)
        places = [at + beside for at in range(len(parts))]
        means, lengths = _with_lengths([of_part[part] for part in parts])
        axis.errorbar(places, means, yerr=lengths, fmt="o", color=f"C{number}", capsize=2, label=method)
    axis.set_xticks(range(len(parts)), parts)


def _with_lengths(scores: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[list[float]]]:
    """The means of (mean, low, high), and how far below and above them their intervals reach."""
    sides = [[mean - low for mean, low, _ in scores], [high - mean for mean, _, high in scores]]
    # NaN draws nothing, and a bound never lies on the wrong side of its mean but for rounding.
    return [mean for mean, _, _ in scores], [
        [max(0.0, each) if each == each else each for each in side] for side in sides
    ]


# Positions. A mean over a few dozen rows jumps from token to token, so a curve is the running mean over this window.
_WINDOW = 9
# A curve is dotted where fewer than this share of the rows get that far.
_FEW_ROWS = 0.25


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
    figure.supxlabel(
        f"Running means over {_WINDOW} positions; dotted where fewer than {_FEW_ROWS:.0%} of the rows get that far.",
        fontsize="small",
    )
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.set(xlabel="position in the response (tokens)")
    return figure, axes


def _draw_curve(axis: Axes, curve: ByPosition, label: str, color: str, width: float = 1.5) -> None:
    means = []
    for position in range(len(curve.rows)):
        near = slice(max(0, position - _WINDOW // 2), position + _WINDOW // 2 + 1)
        total = sum(mean * rows for mean, rows in zip(curve.mean[near], curve.rows[near], strict=True))
        means.append(total / sum(curve.rows[near]))
    enough = sum(rows >= _FEW_ROWS * curve.rows[0] for rows in curve.rows)
    axis.plot(means[:enough], color=color, label=label, linewidth=width)
    axis.plot(range(enough - 1, len(means)), means[enough - 1 :], color=color, linestyle=":", linewidth=width)


def _draw_rows(axis: Axes, rows: Mapping[str, Sequence[int]]) -> None:
    for name, counts in rows.items():
        axis.step(range(len(counts)), counts, where="mid", label=name or None)
    axis.set(title="rows that get that far", ylim=(0, None))


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as partial:
        # The temporary name does not tell the format.
        figure.savefig(partial, dpi=120, format="png")
    return path
