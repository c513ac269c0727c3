"""A plan for the terminal: the splits, the memory of the best by part, and what it all assumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from switchkd.models.pair import rounded
from switchkd.scale.cost import GIB, Clock
from switchkd.scale.plan import Job, Option
from switchkd.scale.sizes import ModelSize

_SPREADS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "fsdp2": "FSDP2"}
_TEACHERS = {
    "each": "every GPU",
    "cpu": "cpu",
    "shared": "shared",
    "device_map": "device_map",
}
_ADVICE = {
    "each": "the teacher whole on every GPU",
    "cpu": "teacher_offload: cpu",
    "shared": "teacher_offload: shared",
    "device_map": "one process, and teacher_model_init_kwargs: {device_map: auto}",
}
_PHASES = ("all the time", "in rollouts", "in the loss", "in backward")


_CAPTION = (
    "GiB of the fullest GPU; rows: rollout_rows; batch: per_device_train_batch_size; ckpt: activation_checkpointing"
)


def plan_page(student: ModelSize, teacher: ModelSize, options: Sequence[Option], job: Job, clock: Clock) -> Group:
    """All of a plan: `options` as `plan` orders them."""
    cluster, best = clock.cluster, options[0]
    at_once = f", those of {job.rollout_steps} steps written at once" if job.rollout_steps > 1 else ""
    head = (
        f"{pair_name(student, teacher)}: {job.texts} texts a step{at_once}, prompts and responses of up to {job.prompt} "
        f"and {job.response} tokens, on {cluster.gpus} GPUs of {cluster.memory / GIB:.0f} GiB, {cluster.link:g} GB/s between them"
    )
    parts: list[RenderableType] = [Text(head), splits_table(options), Text(verdict(best))]
    if best.fits:
        parts.append(memory_table(best))
    return Group(*parts, Text(assumptions(clock)))


def pair_name(student: ModelSize, teacher: ModelSize) -> str:
    """Both models with their sizes."""
    short = (f"{each.name.rpartition('/')[2]} ({rounded(each.parameters)})" for each in (student, teacher))
    return " from ".join(short)


def verdict(best: Option) -> str:
    """What to do, or why there is nothing to do."""
    if not best.fits:
        name, size = best.largest
        return f"Nothing fits: even {_name(best)} needs {_gib(best.bytes)} on a GPU, of which {name} {_gib(size)}."
    load = best.load
    return (
        f"Take {_name(best)}: rollout_rows {load.rollout_rows}, per_device_train_batch_size {load.rows}, "
        f"gradient_accumulation_steps {-(-load.texts // load.rows)}, activation_checkpointing {str(load.checkpointing).lower()}."
    )


def _name(option: Option) -> str:
    return f"{_SPREADS[option.split.spread]}, {_ADVICE[option.split.teacher]}"


def splits_table(options: Sequence[Option]) -> Table:
    """A row for every split."""
    table = Table(
        "split",
        "teacher",
        "GiB",
        "s/step",
        "rows",
        "batch",
        "ckpt",
        "too large",
        caption=_CAPTION,
        caption_justify="left",
    )
    for each in options:
        name, size = each.largest
        load = each.load
        table.add_row(
            _SPREADS[each.split.spread],
            _TEACHERS[each.split.teacher],
            f"{each.bytes / GIB:.1f}",
            f"{each.time:.1f}" if each.fits else "-",
            str(load.rollout_rows),
            str(load.rows),
            "yes" if load.checkpointing else "no",
            "" if each.fits else f"{name}, {_gib(size)}",
        )
    return table


def memory_table(option: Option) -> Table:
    """The memory of one split by part, and its time by part beside it."""
    table = Table("memory", "when", "GiB", title="By part", title_justify="left")
    for when, parts in zip(_PHASES, option.memory, strict=True):
        for name, size in parts.items():
            table.add_row(name, when, f"{size / GIB:.2f}")
    for name, seconds in option.seconds.items():
        table.add_row(name, "time", f"{seconds:.2f} s")
    return table


def assumptions(clock: Clock) -> str:
    """What the times and the memory rest on, in one line."""
    cluster = clock.cluster
    given = {
        "tera_flops": cluster.tera_flops,
        "bandwidth": cluster.bandwidth,
        "host_link": cluster.host_link,
        **asdict(clock.assumed),
    }
    listed = ", ".join(f"{key} {value:g}" for key, value in given.items())
    return f"Assumed, not measured (docs/scale.md explains each): {listed}."


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def pairs_table(planned: Sequence[tuple[ModelSize, ModelSize, Sequence[Option]]]) -> Table:
    """The best split of each pair."""
    table = Table(
        "pair", "split", "teacher", "GiB", "s/step", "rows", "batch", "ckpt", caption=_CAPTION, caption_justify="left"
    )
    for student, teacher, options in planned:
        best = options[0]
        load = best.load
        placed = (_SPREADS[best.split.spread], _TEACHERS[best.split.teacher]) if best.fits else ("nothing fits", "")
        numbers = (f"{best.time:.1f}" if best.fits else "-", str(load.rollout_rows), str(load.rows))
        ticked = "yes" if load.checkpointing else "no"
        table.add_row(pair_name(student, teacher), *placed, f"{best.bytes / GIB:.1f}", *numbers, ticked)
    return table
