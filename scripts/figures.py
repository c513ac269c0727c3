"""Draw the figures of docs/how.md and docs/threshold.md into docs/images: `python scripts/figures.py`.

What can be computed is computed by the package: the noise, the coupled draws, and the text of the embedded pair. The ragged cache
and the objective are drawings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from switchkd import Prompt, Sampling, SpeculativeEngine, Switch, load_pair
from switchkd.distributions.draw import Draft, student_proposal, written_tokens
from switchkd.distributions.noise import Address, Stream, row_keys, uniform

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STUDENT, TEACHER, LINE = "#4c72b0", "#c8590a", "#222222"
# Text stays text, and the same drawing is the same file.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "switchkd", "font.family": "sans-serif", "font.size": 9}


def box(ax: Axes, at: tuple[float, float], size: tuple[float, float], text: str, color: str = "white") -> None:
    ax.add_patch(Rectangle(at, *size, facecolor=color, edgecolor=LINE, linewidth=1))
    ax.text(at[0] + size[0] / 2, at[1] + size[1] / 2, text, ha="center", va="center")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=LINE, linewidth=1))


def bare(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")


def addressed_noise() -> Figure:
    """The uniform of each (prompt, position): computed at once, by two processes, and after a resume, it is the same."""
    prompts, positions = [Prompt((5,), n) for n in range(6)], 12

    def drawn(rows: slice, columns: slice) -> torch.Tensor:
        key = row_keys(0, prompts[rows])[:, None]
        position = torch.arange(positions)[columns].expand(len(key), -1)
        return uniform(Address(key.expand_as(position), position), Stream.KEEP)

    whole = drawn(slice(None), slice(None))
    halves = torch.cat([drawn(slice(0, 3), slice(None)), drawn(slice(3, 6), slice(None))])
    resumed = torch.cat([drawn(slice(None), slice(0, 7)), drawn(slice(None), slice(7, None))], dim=1)
    assert whole.equal(halves)
    assert whole.equal(resumed)

    figure, ax = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    ax.imshow(whole.numpy(), cmap="Greys", vmin=-0.1, vmax=1.6, aspect="auto")
    for (row, column), value in zip(
        torch.cartesian_prod(torch.arange(6), torch.arange(12)).tolist(), whole.flatten(), strict=True
    ):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    ax.axhline(2.5, color=STUDENT, linewidth=2)
    ax.axvline(6.5, color=TEACHER, linewidth=2, linestyle="--")
    ax.text(11.6, 1, "process 0", color=STUDENT, va="center")
    ax.text(11.6, 4, "process 1", color=STUDENT, va="center")
    ax.text(6.5, -0.7, "stopped and resumed here", color=TEACHER, ha="center")
    ax.set(xlabel="position", ylabel="prompt", xticks=range(12), yticks=range(6))
    return figure


def coupled_draw() -> Figure:
    """Twenty thousand coupled draws of the teacher's token, beside the probabilities that they should have."""
    student = torch.tensor([0.34, 0.22, 0.16, 0.12, 0.08, 0.05, 0.02, 0.01], dtype=torch.float64)
    teacher = torch.tensor([0.16, 0.30, 0.08, 0.10, 0.05, 0.06, 0.20, 0.05], dtype=torch.float64)
    draws = 20_000
    address = Address(row_keys(0, [Prompt((5,), 0)]).expand(draws), torch.arange(draws))
    student_logp, teacher_logp = (each.log().expand(draws, -1) for each in (student, teacher))
    draft = Draft(student_proposal(student_logp, address, greedy=False), student_logp, address)
    token, replaced = written_tokens(draft, teacher_logp, torch.ones(draws, dtype=torch.bool), greedy=False)
    seen = torch.bincount(token, minlength=8) / draws
    kept = 1 - replaced.double().mean()

    figure, ax = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    # matplotlib asks a tensor for its numbers in a way that numpy warns of.
    p_s, p_t, shared = student.numpy(), teacher.numpy(), torch.minimum(student, teacher).numpy()
    left, right = [n - 0.2 for n in range(8)], [n + 0.2 for n in range(8)]
    ax.bar(left, p_s, 0.38, color="white", edgecolor=STUDENT, linewidth=1.5, label="student's probability")
    ax.bar(left, shared, 0.38, color=STUDENT, alpha=0.45, label="kept as they are")
    ax.bar(right, p_t, 0.38, color="white", edgecolor=TEACHER, linewidth=1.5, label="teacher's probability")
    ax.bar(right, shared, 0.38, color=STUDENT, alpha=0.45)
    ax.bar(right, p_t - shared, 0.38, bottom=shared, color=TEACHER, alpha=0.45, hatch="//", label="the excess")
    ax.plot(right, seen.tolist(), "o", color=LINE, markersize=4, label="share of 20,000 draws")
    ax.set(xlabel="token", ylabel="probability", xticks=range(8), xticklabels=list("abcdefgh"))
    ax.set_title(f"1 - TV = {shared.sum():.2f}; proposals kept: {kept:.3f}", fontsize=9)
    ax.legend(frameon=False)
    return figure


def ragged_cache() -> Figure:
    """Four rows after three blocks of four: each keeps what was accepted, and the rest is written over."""
    prompt, kept = (5, 3, 6, 4), ((4, 2, 4), (1, 4, 3), (4, 4, 4), (3, 1, 2))
    figure, ax = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
    colors = ("#9bb7d4", "#6f98c4", "#4c72b0")
    for row, (start, blocks) in enumerate(zip(prompt, kept, strict=True)):
        for slot in range(20):
            ax.add_patch(Rectangle((slot, -row), 0.92, 0.84, facecolor="none", edgecolor="#cccccc"))
        ax.add_patch(Rectangle((0, -row), start - 0.08, 0.84, facecolor="#dddddd", edgecolor=LINE))
        ax.text(start / 2, -row + 0.42, "prompt", ha="center", va="center", fontsize=8)
        for number, (accepted, color) in enumerate(zip(blocks, colors, strict=True)):
            ax.add_patch(Rectangle((start, -row), accepted - 0.08, 0.84, facecolor=color, edgecolor=LINE))
            ax.text(start + accepted / 2, -row + 0.42, str(number + 1), ha="center", va="center", fontsize=8)
            start += accepted
        rest = 4 - blocks[-1]
        if rest:
            ax.add_patch(Rectangle((start, -row), rest - 0.08, 0.84, facecolor="none", edgecolor=TEACHER, hatch="///"))
    ax.text(0, 1.1, "1, 2, 3: what was kept of each block", fontsize=8)
    ax.text(
        9.5, 1.1, "hatched: drafted, not kept, hidden by the mask, next to be written over", color=TEACHER, fontsize=8
    )
    ax.set(xlim=(-0.2, 20), ylim=(-3.3, 1.7), yticks=[])
    ax.axis("off")
    return figure


def objective() -> Figure:
    """A chunk of positions at a time through both heads; only its sum and the gradients stay."""
    figure, ax = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    bare(ax, 100, 46)
    for bottom, name, color in (
        (26, "student's states\nN x H", "#dbe5f1"),
        (4, "teacher's states\nN x H, kept", "#f7e0cd"),
    ):
        box(ax, (1, bottom), (17, 16), "", color)
        ax.text(9.5, bottom + 13, name, ha="center", va="center", fontsize=8)
        ax.add_patch(Rectangle((1, bottom + 6), 17, 4, facecolor="white", edgecolor=LINE, linewidth=2))
        ax.text(9.5, bottom + 8, "P x H", ha="center", va="center", fontsize=8)
        arrow(ax, (18, bottom + 8), (25, bottom + 8))
        box(ax, (25, bottom + 3), (11, 10), "head\nH x V", color)
        arrow(ax, (36, bottom + 8), (43, bottom + 8))
        box(ax, (43, bottom + 5), (19, 6), "logits P x V", color)
        arrow(ax, (62, bottom + 8), (70, 23 + (1.5 if bottom > 20 else -1.5)))
    ax.text(9.5, 22.6, "a chunk of P positions", ha="center", va="center", fontsize=8)
    ax.text(52.5, 22.6, "freed before the next chunk", ha="center", va="center", fontsize=8)
    box(ax, (70, 17), (13, 12), "divergence\nx weights\nP")
    arrow(ax, (83, 23), (88, 23))
    box(ax, (88, 17), (11, 12), "sum /\ntokens of\nthe step")
    return figure


def switch() -> Figure:
    """A text of the embedded pair, written together."""
    pair = load_pair(student="world:student", teacher="world:teacher")
    assert pair.tokenizer is not None
    engine, policy = SpeculativeEngine(pair), Switch(0.02, decay_rate=0.03)
    (rollout,) = engine.generate(["Take from 55: a 1, b 4, c 4.\n"], policy, Sampling(max_new_tokens=40), seed=0)
    ends = dict.fromkeys(pair.eos_ids, "end")
    tokens = [ends.get(each) or pair.tokenizer.decode([each]).strip() or "↵" for each in rollout.token_ids]
    figure, ax = plt.subplots(figsize=(7.2, 2.8), layout="constrained")
    colors = [TEACHER if teachers else STUDENT for teachers in rollout.written_by_teacher]
    place = range(len(tokens))
    floor = 1e-5
    ax.bar(place, [max(each, floor) for each in rollout.divergence], color=colors)
    ax.plot(place, rollout.threshold, color=LINE, linewidth=1.5)
    ax.text(0.2, rollout.threshold[0] * 1.3, "threshold", color=LINE)
    ax.set_yscale("log")
    ax.set(ylim=(floor, 1), ylabel="divergence, nats", xticks=place, xticklabels=tokens)
    for label, color in zip(ax.get_xticklabels(), colors, strict=True):
        label.set_color(color)
    share = rollout.teacher_share
    ax.set_title(f"blue: the student's tokens; orange: the teacher's ({share:.0%} of {len(tokens)})", fontsize=9)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "addressed-noise": addressed_noise,
    "coupled-draw": coupled_draw,
    "ragged-cache": ragged_cache,
    "objective": objective,
    "switch": switch,
}


def draw(folder: Path) -> None:
    """Write each figure into the folder as NAME.svg."""
    for name, figure in FIGURES.items():
        with mpl.rc_context(SETTINGS):
            drawn = figure()
            drawn.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            plt.close(drawn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    mpl.use("svg")
    draw(parser.parse_args().out)
