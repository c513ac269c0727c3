"""Tables and colored rollouts in the terminal.

What a model wrote goes through `visible` and is never read as markup, so it can neither color the screen nor move the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchkd.analysis.calibration import Calibration
from switchkd.analysis.diagnosis import TextDiagnosis
from switchkd.analysis.distance import Distance
from switchkd.evaluation.score import Evaluation
from switchkd.positions import BUCKET_ENDS, BUCKET_NAMES, Bucket, ByPosition
from switchkd.records import Rollout, teacher_share_of
from switchkd.rollout.jsonl import token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHER_STYLE = "bold magenta"
# Without color, marks stand around what the teacher wrote.
TEACHER_MARKS = ("«", "»")
# A single step is a few sequences: its loss says little.
_STEPS_OF_A_MEAN = 20
# How the names of transformers' times of an evaluation end.
_CLOCK = ("_runtime", "_per_second", "_time")


def visible(text: str) -> str:
    """The text with every control character but line end and tab written out, such as \\x1b."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{hours} h {minutes % 60} min"


def writer_runs(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The response's text in runs of one writer each: (text, whether the teacher wrote it).

    Blanks stay. A character of several tokens belongs to the token that completes it.
    """
    run, run_by_teacher = "", False
    texts = token_texts(rollout.token_ids, tokenizer)
    for text, by_teacher in zip(texts, rollout.written_by_teacher, strict=True):
        if not text:
            continue
        if by_teacher != run_by_teacher:
            if run:
                yield run, run_by_teacher
            run, run_by_teacher = "", by_teacher
        run += text
    if run:
        yield run, run_by_teacher


def rollout_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> Text:
    """A heading with the teacher's share, the prompt, and the response with the teacher's tokens colored (or marked)."""
    text = Text()
    reason = str(rollout.finish_reason).replace("_", " ")
    heading = f"prompt {rollout.prompt.prompt_id}, sample {rollout.prompt.sample_id}: {len(rollout.token_ids)} tokens"
    teacher = " ".join(filter(None, ("teacher", rollout.prompt.teacher)))
    text.append(f"{heading}, {teacher} {rollout.teacher_share:.0%}, ended by {reason}\n", style="bold")
    prompt = str(tokenizer.decode(list(rollout.prompt.token_ids), clean_up_tokenization_spaces=False))
    text.append(visible(prompt), style="dim")
    if not prompt.endswith("\n"):
        text.append("\n")
    for run, by_teacher in writer_runs(rollout, tokenizer):
        opening, closing = TEACHER_MARKS if by_teacher and not color else ("", "")
        text.append(f"{opening}{visible(run)}{closing}", style=TEACHER_STYLE if by_teacher else "")
    text.append("\n")
    return text


def legend(*, color: bool) -> Text:
    """What the colors mean."""
    opening, closing = ("", "") if color else TEACHER_MARKS
    return Text.assemble(
        ("the prompt", "dim"),
        " · written by the student · ",
        (f"{opening}written by the teacher{closing}", TEACHER_STYLE),
    )


def print_rollouts(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, console: Console, shown: int | None = None
) -> None:
    """Print the first `shown` rollouts (all by default), the legend, and the teacher's share of the tokens of all of them."""
    color = console.color_system is not None
    # soft_wrap: the terminal breaks the lines, so that text copied from it has only the model's own.
    for rollout in rollouts[:shown]:
        console.print(rollout_text(rollout, tokenizer, color=color), soft_wrap=True)
    if rollouts:
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        share = Text(f" · the teacher wrote {teacher_share_of(rollouts):.0%} of {tokens:,} tokens")
        console.print(Text.assemble(legend(color=color), share), soft_wrap=True)


def scores_of(logs: Mapping[str, Any]) -> list[str]:
    """The keys of what an evaluation logs beside its loss and its times."""
    return [key for key in logs if key.startswith("eval_") and key != "eval_loss" and not key.endswith(_CLOCK)]


def run_table(events: Sequence[Mapping[str, Any]], model_folder: Path) -> Table:
    """A column for each stage of a run: its steps, measures at its beginning and its end, mean speeds, and its time.

    Beginning and end are means over logged steps, as the caption says; of evaluations they are the first and the last one.
    """
    caption = (
        f"loss, teacher share: means over the first and the last steps, {_STEPS_OF_A_MEAN} or half\n"
        f"the model is in {model_folder}"
    )
    stages = {
        name: [event for event in events if event["stage"] == name]
        for name in dict.fromkeys(event["stage"] for event in events if "loss" in event)
    }
    table = Table(box=box.SIMPLE, show_header=any(stages), caption=Text(caption), caption_justify="left")
    table.add_column(no_wrap=True)
    for name in stages:
        table.add_column(Text(name), justify="right", no_wrap=True)
    scores = dict.fromkeys(chain.from_iterable(map(scores_of, events)))
    rows: list[tuple[str, Callable[[Sequence[Mapping[str, Any]]], str]]] = [
        ("steps", lambda logged: str(max(event["step"] for event in logged if "loss" in event))),
        ("loss", partial(_change, key="loss", form="{:.4f}")),
        ("eval loss", partial(_change, key="eval_loss", form="{:.4f}", most=1)),
        *((key.removeprefix("eval_"), partial(_change, key=key, form="{:.4g}", most=1)) for key in scores),
        ("teacher share", partial(_change, key="teacher_share", form="{:.0%}")),
        ("rollout tok/s", partial(_mean, key="rollout_tokens_per_second")),
        ("train tok/s", partial(_mean, key="train_tokens_per_second")),
        ("time", lambda logged: duration(logged[-1]["seconds"])),
    ]
    for label, cell in rows:
        cells = [cell(logged) for logged in stages.values()]
        if set(cells) != {"-"}:
            table.add_row(label, *cells)
    return table


def _change(logged: Sequence[Mapping[str, Any]], key: str, form: str, most: int = _STEPS_OF_A_MEAN) -> str:
    """The mean of the first values → that of the last ones: `most` of them, or half. One value stands alone."""
    values = [event[key] for event in logged if key in event]
    if len(values) < 2:
        return form.format(*values) if values else "-"
    count = max(1, min(most, len(values) // 2))
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    return f"{form.format(first)} → {form.format(last)}"


def _mean(logged: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [event[key] for event in logged if key in event]
    return f"{sum(values) / len(values):,.0f}" if values else "-"


def comparison_table(evaluations: Mapping[str, Evaluation], set_name: str) -> Table:
    """Exact match and ROUGE-L of several evaluations of one set side by side, a line for each bucket and for all."""
    table = Table(box=box.SIMPLE, title=f"{set_name}, greedy: exact match (EM) and ROUGE-L, 0 to 100")
    table.add_column("response")
    table.add_column("rows", justify="right")
    for measure in ("EM", "ROUGE-L"):
        for label in evaluations:
            table.add_column(f"{measure}\n{label}", justify="right")
    results = [evaluation.sets[set_name] for evaluation in evaluations.values()]
    lines = [(name, [result.by_bucket[name] for result in results]) for name in results[0].by_bucket]
    for name, summaries in [*lines, ("all", [result.overall for result in results])]:
        exact = [f"{summary.mean.exact_match:.1f}" for summary in summaries]
        rouge = [f"{summary.mean.rouge_l:.1f}" for summary in summaries]
        table.add_row(Text(name), str(summaries[0].rows), *exact, *rouge)
    return table


_MEANING_OF_PREFIXES = (
    "discrepancy: |log p_T - log p_S| of the tokens, added up; trust: min(1, p_T / p_S); margin: the teacher's,\n"
    "between its two favorites of the student's 16 likeliest; divergence behind: its share after these positions"
)
_MEANING_OF_ROWS = "rows: the number that reach the first and the last position; means are over these"


def calibration_table(calibration: Calibration) -> Table:
    """A line for each bucket of positions: divergence and threshold in nats, and the share that the teacher wrote."""
    table = Table(box=box.SIMPLE, caption=Text(_MEANING_OF_ROWS), caption_justify="left")
    for heading in ("positions", "rows", "tokens", "divergence", "threshold", "teacher\nshare"):
        table.add_column(heading, justify="left" if heading == "positions" else "right", no_wrap=True)
    # All rows have the same threshold. As a curve over the same rows it falls into the same buckets.
    threshold = ByPosition(calibration.threshold, calibration.divergence.rows)
    curves = (calibration.divergence, threshold, calibration.teacher_share)
    for divergence, limit, share in zip(*(curve.buckets() for curve in curves), strict=True):
        means = (f"{divergence.mean:.3g}", f"{limit.mean:.3g}", f"{share.mean:.0%}")
        table.add_row(divergence.name, _rows(divergence), f"{divergence.tokens:,}", *means)
    table.add_section()
    total = f"{calibration.measured_share:.1%}"
    table.add_row("all", str(calibration.prompts), f"{calibration.tokens:,}", "", "", total)
    return table


def diagnosis_table(texts: Mapping[str, TextDiagnosis]) -> Table:
    """A line for each bucket of positions and each text: the teacher's perplexity, the divergence, its entropy."""
    table = Table(box=box.SIMPLE, caption=Text(_MEANING_OF_ROWS), caption_justify="left")
    for heading in ("positions", "text by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rows", "perplexity\nso far", "divergence\n(nats)", "teacher's\nentropy (nats)"):
        table.add_column(heading, justify="right", no_wrap=True)
    # For each text the buckets that it reaches, as (perplexity, divergence, entropy).
    reached = {
        name: list(zip(text.log_perplexity.buckets(), text.divergence.buckets(), text.entropy.buckets(), strict=True))
        for name, text in texts.items()
    }
    for number in range(max(map(len, reached.values()))):
        lines = {name: buckets[number] for name, buckets in reached.items() if number < len(buckets)}
        for index, (name, (perplexity, divergence, entropy)) in enumerate(lines.items()):
            means = (f"{math.exp(perplexity.mean):.3f}", f"{divergence.mean:.4f}", f"{entropy.mean:.3f}")
            table.add_row("" if index else perplexity.name, name, _rows(perplexity), *means)
        table.add_section()
    return table


def prefix_table(texts: Mapping[str, TextDiagnosis]) -> Table:
    """A line for each bucket of positions and each text: the measures of the papers on failing prefixes."""
    table = Table(box=box.SIMPLE, caption=Text(_MEANING_OF_PREFIXES), caption_justify="left")
    for heading in ("positions", "text by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("discrepancy\nso far (nats)", "trust", "margin\n(nats)", "divergence\nbehind"):
        table.add_column(heading, justify="right", no_wrap=True)
    reached = {name: text.prefixes.discrepancy.buckets() for name, text in texts.items()}
    for number in range(max(map(len, reached.values()))):
        lines = [name for name, buckets in reached.items() if number < len(buckets)]
        for index, name in enumerate(lines):
            found, bucket = texts[name].prefixes, reached[name][number]
            trust, margins = found.trust.buckets()[number], found.margin.buckets()
            margin = f"{margins[number].mean:.2f}" if margins else "-"
            last = min((*BUCKET_ENDS, len(found.behind))[number], len(found.behind)) - 1
            cells = (f"{bucket.mean:.2f}", f"{trust.mean:.1%}", margin, f"{found.behind[last]:.0%}")
            table.add_row("" if index else bucket.name, name, *cells)
        table.add_section()
    return table


def distance_table(distance: Distance) -> Table:
    """A line for each bucket of positions and one for whole responses: KL(student || teacher) and KL(teacher || student)."""
    caption = (
        "each on its own writer's text at temperature 1, nats a token; a response: nats, ± standard error over prompts"
    )
    table = Table(box=box.SIMPLE, caption=Text(caption), caption_justify="left")
    table.add_column("positions", no_wrap=True)
    for name in ("student ||\nteacher", "teacher ||\nstudent"):
        table.add_column("rows", justify="right", no_wrap=True)
        table.add_column(f"KL({name})", justify="right", no_wrap=True)
    both = (distance.reverse, distance.forward)
    buckets = [
        {bucket.name: (_rows(bucket), f"{bucket.mean:.4f}") for bucket in kl.by_position.buckets()} for kl in both
    ]
    for position in BUCKET_NAMES:
        if cells := [each.get(position, ("-", "-")) for each in buckets if position in buckets[0] | buckets[1]]:
            table.add_row(position, *chain.from_iterable(cells))
    table.add_section()
    for label, value, error in (("a token", "per_token", "per_token_error"), ("a response", "mean", "standard_error")):
        found = [(str(len(kl.tokens)), f"{getattr(kl, value):.4g} ± {getattr(kl, error):.2g}") for kl in both]
        table.add_row(label, *chain.from_iterable(found))
    return table


def _rows(bucket: Bucket) -> str:
    return " → ".join(map(str, bucket.rows))
