"""The method table for the terminal, and as a Markdown page: docs/methods.md is what `switchkd methods --markdown` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from switchkd.distributions.divergences import DIVERGENCE
from switchkd.loss.targets import OF_TEACHER
from switchkd.loss.weights import WEIGHT
from switchkd.methods.config import SwitchConfig
from switchkd.methods.parts import AUTO, COMPONENTS, HEADLINE
from switchkd.methods.table import Method
from switchkd.rollout.policies import POLICY
from switchkd.settings.components import Registry, settings_of

_HEAD = """# Methods

Made by `switchkd methods --markdown` from the table in `src/switchkd/methods/table.py`; a test holds the two together. A method is
**policy x divergence x weights x target x data schedule x start**, and each part can be replaced, as by
`--set divergence=reverse_kl` or `--set weight=importance`.

"""


_LEFT_OUT = """
## Parts without a row

A run can set these in any row: `target: proximal` and `target: extrapolated` (ExOPD, arXiv 2602.12125), `length_growth`
(TCOD, arXiv 2604.24005), `replayed_prefix` with `source: teacher`, `kappa: 1` and `until: 1` (the guidance of TrOPD),
`start_weight` (StableOPD), and any list of weights.

## What is left out, and why

- TrOPD's clipped outliers, and the sampled-token estimates that TrOPD, IW-OPD, ExOPD and TOP-D take. Our divergences are
  over the whole vocabulary, which has the same mean and less noise; a clip of the estimate has no counterpart there. How
  TrOPD draws a prefix's length below its maximum could not be read; ours is uniform over eighths.
- TOP-D (arXiv 2607.04751): its proximal teacher is the arithmetic mean of the two models, and its credit runs over later
  tokens of a group of rollouts. `proximal` is the geometric mean, and there are no groups.
- Release (arXiv 2605.13643): margin, number of candidates and the form of the criterion could not be read, and sentences
  are not known to a tokenizer. What `release` does is written in its docstring, and is ours.
- TRD (arXiv 2606.08432): the authors' code shows the teacher the student's attempt while it scores, and rewrites once. The
  paper itself could not be read.
- Prefix distillation (arXiv 2602.15260): the length, and by how much it grows with the steps, could not be read.
- StableOPD (arXiv 2604.08527): its two weights could not be read at the source.
- ReOPD (arXiv 2607.04763) is for agents of many turns; what the environment answered has no counterpart here.
"""


def method_settings(method: Method) -> Iterator[tuple[str, Any, str]]:
    """The settings that act on a method: the key in a run file, the value in force where a run gives none, and its sentence."""
    sentences = {key: each.metadata.get("help", "") for key, each in settings_of(SwitchConfig).items()}
    rolls_out = method.student_share or method.share_rise
    if rolls_out:
        for key, value, sentence in _of_component("policy", POLICY, method.policy, sentences["policy"]):
            is_found = key == "threshold" and method.finds_threshold
            yield (key, AUTO, sentences[key]) if is_found else (key, value, sentence)
    for key, registry in COMPONENTS.items():
        part = getattr(method, key)
        # What every row has, and hardly one reads, is shown where it acts.
        acts = {"target": part != OF_TEACHER, "start_divergence": method.start_weight > 0}.get(key, part is not None)
        if acts:
            yield from _of_component(key, registry, part, sentences[key])
    for weight in method.weight:
        yield from _of_component("weight", WEIGHT, weight, sentences["weight"])
    plain = {
        "cross_entropy_weight": True,
        "student_share": rolls_out,
        "loss_temperature": method.divergence is not None,
    }
    optional = ("teacher_text_share", "share_rise", "replay_capacity", "long_term_weight", "start_weight")
    plain |= {key: bool(getattr(method, key)) for key in optional} | {"replay_share": bool(method.replay_capacity)}
    for key, acts in plain.items():
        if acts:
            yield key, getattr(method, key, getattr(SwitchConfig, key)), sentences[key]
    if method.teacher_writes_data:
        yield "teacher_text", None, sentences["teacher_text"]


def _of_component(key: str, registry: Registry[Any], part: Any, sentence: str) -> Iterator[tuple[str, Any, str]]:
    yield key, registry.name_of(type(part)), sentence
    for name, each in settings_of(type(part)).items():
        yield name if name in HEADLINE else f"{key}.{name}", getattr(part, name), each.metadata.get("help", "")


def compared(method: Method) -> str:
    """The names of a method's divergences, or "-"."""
    both = (method.divergence, method.teacher_text_divergence)
    return ", ".join(DIVERGENCE.name_of(type(each)) for each in both if each is not None) or "-"


def methods_table(methods: Mapping[str, Method]) -> Table:
    """The method table, a line for each method."""
    table = Table(box=box.SIMPLE, caption=Text("more about one: switchkd methods NAME"), caption_justify="left")
    for heading in ("method", "rolled\nout", "divergence", "cross-\nentropy", "what it does"):
        table.add_column(heading)
    for name, method in methods.items():
        row = (
            f"{method.student_share:.0%}",
            compared(method),
            f"{method.cross_entropy_weight:g}",
            method.summary,
        )
        table.add_row(Text(name, style="bold"), *map(Text, row))
    return table


def method_details(name: str, method: Method) -> Group:
    """A method's row in full, and the settings that act on it with the values in force where a run gives none."""
    texts, settings = (Table(show_header=False, box=None, pad_edge=False) for _ in range(2))
    for label in ("summary", "source", "departs"):
        texts.add_row(Text(label, style="bold"), Text(getattr(method, label)))
    for key, value, sentence in method_settings(method):
        settings.add_row(Text(key, style="cyan"), Text("-" if value is None else str(value)), Text(sentence))
    return Group(Text(name, style="bold"), texts, Text("\nsettings, with the values in force:"), settings)


def methods_page(methods: Mapping[str, Method]) -> str:
    """All methods in one table, then each with its source, its departures from it and its settings."""
    lines = [
        "| method | who writes | rolled out | compared | where it counts | cross-entropy | start |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, method in methods.items():
        rises = f", rising by {method.share_rise:g}" if method.share_rise else ""
        cells = (
            f"[{name}](#{name})",
            method.writer,
            f"{method.student_share:.0%}{rises}",
            compared(method),
            ", ".join(WEIGHT.name_of(type(weight)) for weight in method.weight) or "uniform",
            f"{method.cross_entropy_weight:g}",
            method.start,
        )
        lines.append(f"| {' | '.join(cells)} |")
    sections = "".join(_section(name, method) for name, method in methods.items())
    return _HEAD + "\n".join(lines) + "\n" + sections + _LEFT_OUT


def _section(name: str, method: Method) -> str:
    settings = ", ".join(
        f"`{key}`" + ("" if value is None else f" {_in_a_line(value)}") for key, value, _ in method_settings(method)
    )
    return (
        f"\n## {name}\n\n{method.summary[0].upper()}{method.summary[1:]}.\n\n- source: {method.source}\n"
        f"- departs: {method.departs}\n- settings: {settings}\n"
    )


def _in_a_line(value: Any) -> str:
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)
