"""The settings of a run for the terminal and as Markdown: docs/settings.md is what `switchkd settings --markdown` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field
from typing import Any, get_type_hints

from rich.console import Group
from rich.table import Table
from rich.text import Text

from switchkd.errors import UserError, did_you_mean
from switchkd.loss.weights import WEIGHT
from switchkd.methods.parts import AUTO, COMPONENTS
from switchkd.methods.plan import AutoThreshold
from switchkd.rollout.policies import POLICY
from switchkd.settings.components import settings_of
from switchkd.settings.typed import type_in_words

Fields = Mapping[str, Field[Any]]

# In the order in which somebody who writes a run file meets them. What is in no group stands in the last one.
GROUPS: dict[str, tuple[str, ...]] = {
    "The run": (
        "student", "teacher", "teachers", "train_data", "eval_data", "eval_scores", "data_dir", "output_dir", "stages",
    ),
    "Method": ("method", "policy", "divergence", "teacher_text_divergence", "target", "weight"),
    "The threshold of SWITCH": ("threshold", "decay", "decay_rate", "final_fraction"),
    "Where the text comes from": (
        "student_share", "teacher_text_share", "teacher_text", "share_rise", "replay_capacity", "replay_share",
        "replayed_prefix", "length_growth", "rewrite", "rollout_steps",
    ),
    "Loss": (
        "cross_entropy_weight", "cross_entropy_on", "long_term_weight", "loss_temperature", "start_weight",
        "start_divergence",
    ),
    "Length and sampling": ("max_prompt_tokens", "max_new_tokens", "temperature", "top_p", "top_k"),
    "Data and chats": (
        "columns", "teacher_column", "skip_bad_rows", "template_from", "chat_template_kwargs", "add_bos", "train_turns",
    ),
    "Models and adapters": (
        "peft", "adapter", "student_quantization", "teacher_quantization", "student_drop_layers", "model_init_kwargs",
        "teacher_model_init_kwargs", "trust_remote_code",
    ),
    "Device, precision and memory": (
        "device", "precision", "bf16", "dtype", "teacher_dtype", "attn_implementation", "rollout_rows", "block_size",
        "compile", "teacher_offload",
    ),
}  # fmt: skip
LAST_GROUP = "Training and logs"
# What a setting that is a part can be by name, each with settings of its own.
_PARTS: dict[str, Mapping[str, Any]] = {
    "policy": POLICY.own,
    "weight": WEIGHT.own,
    "threshold": {AUTO: AutoThreshold},
    **{key: registry.own for key, registry in COMPONENTS.items()},
}
_HEAD = """# Settings of a run file

Made by `switchkd settings --markdown`; a test holds it to the code. `switchkd settings NAME` shows one of them. Every field of
`transformers.TrainingArguments` is a setting as well, such as `max_steps`, `per_device_train_batch_size` and `seed`. Listed are our
own, and those whose default is another here. Where a default is empty, the method decides, or the sentence says what holds.

`--set key=value` puts a value over the run file's, and a dotted key reaches into a part: `--set policy.keep_top_k=10`.

"""


def grouped(fields: Fields) -> dict[str, list[str]]:
    """The keys of the settings by group, each once."""
    groups = {group: [key for key in keys if key in fields] for group, keys in GROUPS.items()}
    placed = {key for keys in groups.values() for key in keys}
    return {**groups, LAST_GROUP: [key for key in fields if key not in placed]}


def default_of(field: Field[Any]) -> str:
    """The default of a setting in a word; "required" where there is none, "" where it is open."""
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    if default is MISSING:
        return "" if field.name == "output_dir" else "required"
    return (
        "" if default is None or default == () else str(default).lower() if default in (True, False) else str(default)
    )


def _sentence(field: Field[Any]) -> str:
    return str(field.metadata.get("help", ""))


def settings_tables(fields: Fields, hints: Mapping[str, Any]) -> Group:
    """All settings for the terminal, a table for each group."""
    parts: list[Any] = []
    for group, keys in grouped(fields).items():
        table = _plain_table()
        for key in keys:
            table.add_row(Text(key, style="cyan"), _described(fields[key], hints[key]))
        parts += [Text(group, style="bold"), table, Text()]
    return Group(*parts, Text("more about one: switchkd settings NAME"))


def _plain_table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _described(field: Field[Any], hint: Any) -> Text:
    default = default_of(field)
    facts = [type_in_words(hint), default if default in ("", "required") else f"default {default}"]
    return Text.assemble(_sentence(field), (f" ({'; '.join(filter(None, facts))})", "dim"))


def setting_details(name: str, fields: Fields, hints: Mapping[str, Any], inherited: Fields) -> Group:
    """One setting in full, with the settings of the parts that it chooses from.

    `name` may be dotted (policy.keep_top_k), or a field of `inherited`, those of transformers. Raises UserError, with the nearest
    name, for an unknown one.
    """
    if name in fields:
        return Group(*_head(name, fields[name], hints[name]), *_choices(name))
    inside = {
        f"{key}.{each}": (choice, each) for key in _PARTS for choice in _PARTS[key] for each in _part(key, choice)
    }
    dotted = [place for place in inside if name in (place, place.partition(".")[2])]
    if dotted:
        key, _, own = dotted[0].partition(".")
        takers = [choice for choice in _PARTS[key] if own in _part(key, choice)]
        part = _PARTS[key][takers[0]]
        lines = _head(dotted[0], settings_of(part)[own], get_type_hints(part)[own])
        return Group(*lines, Text(f"of {key} {', '.join(takers)}; more about it: switchkd settings {key}"))
    if name in inherited:
        of = Text("of transformers.TrainingArguments, which describes it further")
        return Group(*_head(name, inherited[name], hints[name]), of)
    raise UserError(f"there is no setting {name!r}{did_you_mean(name, [*fields, *inside, *inherited])}")


def _head(name: str, field: Field[Any], hint: Any) -> list[Any]:
    table = _plain_table()
    for label, said in (
        ("what", _sentence(field)),
        ("type", type_in_words(hint)),
        ("default", default_of(field) or "-"),
    ):
        # transformers' own sentences are broken into lines as its source is.
        table.add_row(Text(label, style="bold"), Text(" ".join(said.split())))
    return [Text(name, style="bold cyan"), table]


def _part(key: str, choice: str) -> Fields:
    return settings_of(_PARTS[key][choice])


def _choices(key: str) -> Iterator[Any]:
    """What a part can be, with the settings of each."""
    if key == "method":
        yield Text("the choices: switchkd methods")
    for choice in _PARTS.get(key, {}):
        part = _PARTS[key][choice]
        yield Text.assemble("\n", f"{key}: ", (choice, "bold cyan"), f"  {_first_line(part)}")
        table, hints = _plain_table(), get_type_hints(part)
        for name, field in _part(key, choice).items():
            table.add_row(Text(f"  {key}.{name}", style="cyan"), _described(field, hints[name]))
        yield table


def _first_line(part: type[Any]) -> str:
    line = (part.__doc__ or "").strip().partition("\n")[0]
    # Which errors there are is for those who write Python.
    return line.partition(" Raises ")[0]


def settings_page(fields: Fields, hints: Mapping[str, Any]) -> str:
    """All settings as Markdown, a table for each group, then the parts with their settings."""
    lines = [_HEAD]
    for group, keys in grouped(fields).items():
        lines.append(f"## {group}\n\n| setting | type | default | |\n| --- | --- | --- | --- |\n")
        lines += [_row(f"`{key}`", fields[key], hints[key]) for key in keys]
        lines.append("\n")
    lines.append("## Parts and their settings\n")
    # Three settings are divergences, and one section says what those are.
    shown: list[Mapping[str, Any]] = []
    for key, choices in _PARTS.items():
        if choices not in shown:
            shown.append(choices)
            lines += [f"\n### {key}\n\n", *_section(key)]
    return "".join(lines)


def _section(key: str) -> Iterator[str]:
    for choice, part in _PARTS[key].items():
        yield f"- **{choice}**: {_first_line(part)}\n"
    rows = [
        _row(f"`{choice}` | `{key}.{name}`", field, get_type_hints(_PARTS[key][choice])[name])
        for choice in _PARTS[key]
        for name, field in _part(key, choice).items()
    ]
    if rows:
        yield "\n| of | setting | type | default | |\n| --- | --- | --- | --- | --- |\n"
        yield from rows


def _row(names: str, field: Field[Any], hint: Any) -> str:
    default, words = default_of(field), (type_in_words(hint), _sentence(field))
    kind, sentence = (" ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") for text in words)
    shown = f"`{default!r}`" if "\n" in default else f"`{default}`" if default not in ("", "required") else default
    return f"| {names} | {kind} | {shown} | {sentence} |\n"
