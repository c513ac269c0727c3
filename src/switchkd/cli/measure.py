"""The commands that measure a pair: the threshold for a teacher share, and whether the teacher misguides."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.text import Text

from switchkd.cli.help import OUTPUT, POLICY, option
from switchkd.cli.options import (
    MeasuredPair,
    engine_of,
    new_console,
    policy_named,
    policy_settings,
    quiet_transformers,
    rendered,
    with_options,
)
from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.settings.components import settings_of
from switchkd.settings.paper import DEFAULT_SHARE

if TYPE_CHECKING:
    from switchkd.analysis.calibration import Calibration
    from switchkd.models.pair import ModelPair
    from switchkd.records import Prompt
    from switchkd.report.rounds import WatchedEngine


@with_options
def calibrate(
    options: MeasuredPair,
    context: typer.Context,
    teacher_share: Annotated[
        float, option(POLICY, "SHARE", "The share of tokens that the teacher is to write, 0 to 1.")
    ] = DEFAULT_SHARE,
    output: Annotated[Path, option(OUTPUT, "FOLDER", "Folder for calibration.json and .png.")] = Path("calibration"),
) -> None:
    """Find the SWITCH threshold at which the teacher writes a given share of the tokens.

    --decay, --decay-rate and --final-fraction shape how it falls (switchkd settings policy).
    """
    from switchkd.analysis.calibration import calibrate as solve
    from switchkd.report.plots import save_calibration
    from switchkd.report.terminal import calibration_table

    quiet_transformers()
    if "threshold" in policy_settings(context, "switch"):
        raise UserError("--threshold is what calibrate finds; leave it out")
    shape: Any = policy_named("switch", context)
    sampling = options.sampling
    console = new_console()
    with _engine_at_work(options, console) as (_, engine, prompts):
        found = solve(engine, prompts, sampling, teacher_share=teacher_share, policy=shape, seed=options.seed)
    console.print(calibration_table(found))
    place = output / "calibration.json"
    _write(place, {**found.as_json(), "max_new_tokens": options.max_new_tokens, "seed": options.seed})
    plot = save_calibration(found, place.with_suffix(".png"))
    console.print(Text(_for_the_run_file(found, options)), soft_wrap=True)
    console.print(Text(_where(place, plot)), soft_wrap=True)


def _for_the_run_file(found: Calibration, options: MeasuredPair) -> str:
    """What was found, how the divergence is spread, and all that the number holds for."""
    share = found.measured_share
    nearest = "" if found.reached else f" (no nearer to {found.wanted_share:.1%} could be found; give more prompts)"
    spread = ", ".join(f"{each:.0%} below {value:.2g}" for each, value in found.quantiles.items())
    settings = yaml.safe_dump(_settings_of(found, options), sort_keys=False, allow_unicode=True)
    return (
        f"The teacher writes {share:.1%}{nearest} of {found.tokens:,} tokens after {found.rounds} rounds.\n"
        f"Divergence of the tokens, in nats: {spread}.\n"
        f"The threshold holds for these settings. In the run file:\n{indent(settings, '  ')}"
    )


def _settings_of(found: Calibration, options: MeasuredPair) -> dict[str, Any]:
    from switchkd.rollout.policies import Switch

    policy = found.policy
    # A falling threshold may start above every divergence, which a run takes from nobody but itself.
    fixed = policy.threshold <= math.log(2)
    auto = {"name": "auto", "teacher_share": found.wanted_share}
    always = ("max_prompt_tokens", "max_new_tokens", "temperature", "top_p", "top_k")
    if_changed = ("template_from", "add_bos", "precision", "dtype")
    unchanged = {key: each.default for key, each in settings_of(type(options)).items()}
    values = {
        "student": options.student,
        "teacher": options.teacher,
        "train_data": options.data,
        "threshold": float(f"{policy.threshold:.3g}") if fixed else auto,
        "decay": policy.decay if policy.decay != Switch.decay else None,
        "decay_rate": policy.decay_rate,
        "final_fraction": policy.final_fraction,
        **{key: getattr(options, key) for key in always},
        **{key: value for key in if_changed if (value := getattr(options, key)) != unchanged[key]},
        "chat_template_kwargs": dict(rendered(options).template_kwargs) or None,
    }
    return {key: value for key, value in values.items() if value is not None}


@with_options
def diagnose(
    options: MeasuredPair,
    context: typer.Context,
    teacher_share: Annotated[
        float | None,
        option(
            POLICY,
            "SHARE",
            f"Without --threshold, find the threshold for this teacher share; by default {DEFAULT_SHARE}.",
        ),
    ] = None,
    output: Annotated[Path, option(OUTPUT, "FOLDER", "Folder for diagnosis.json and .png.")] = Path("diagnosis"),
) -> None:
    """Measure whether the teacher misguides: what it makes of text by the student, by SWITCH and by itself.

    It also tells how far apart the two models are as writers of whole responses, at temperature 1.
    SWITCH's settings are options as well, such as --threshold 0.3 (switchkd settings policy).
    """
    from switchkd.analysis.calibration import calibrate as solve
    from switchkd.analysis.diagnosis import diagnose as measure
    from switchkd.analysis.diagnosis import share_line
    from switchkd.analysis.distance import distance_to_teacher
    from switchkd.report.plots import save_diagnosis
    from switchkd.report.terminal import diagnosis_table, distance_table, prefix_table

    quiet_transformers()
    finds_threshold = "threshold" not in policy_settings(context, "switch")
    if not finds_threshold and teacher_share is not None:
        raise UserError("--threshold and --teacher-share are two ways to say the same thing; give one of them")
    switch: Any = policy_named("switch", context)
    sampling = options.sampling
    console = new_console()
    with _engine_at_work(options, console) as (pair, engine, prompts):
        if finds_threshold:
            wanted = DEFAULT_SHARE if teacher_share is None else teacher_share
            switch = solve(engine, prompts, sampling, teacher_share=wanted, policy=switch, seed=options.seed).policy
        texts = measure(pair, prompts, sampling, switch=switch, seed=options.seed, engine=engine)
        longest, by_itself = options.max_new_tokens, engine_of(options, pair.swapped())
        distance = distance_to_teacher(
            pair, prompts, max_new_tokens=longest, seed=options.seed, engine=engine, teacher_engine=by_itself
        )
    for table in (diagnosis_table(texts), prefix_table(texts), distance_table(distance)):
        console.print(table)
    settings = {"prompts": len(prompts), "max_new_tokens": longest, "seed": options.seed}
    found = {"texts": {name: text.as_json() for name, text in texts.items()}, "distance": distance.as_json()}
    _write(place := output / "diagnosis.json", settings | found)
    plot = save_diagnosis(texts, place.with_suffix(".png"))
    console.print(Text(f"SWITCH's text, threshold {switch.threshold:.3g}: {share_line(texts)}"), soft_wrap=True)
    console.print(Text(f"the student's text: {texts['student'].cures}"), soft_wrap=True)
    console.print(Text(_where(place, plot)), soft_wrap=True)


@contextmanager
def _engine_at_work(options: MeasuredPair, console: Console) -> Iterator[tuple[ModelPair, WatchedEngine, list[Prompt]]]:
    """The pair, its engine and the prompts, with a line for each round while they are at work."""
    from switchkd.analysis.cures import MARGIN_TOP_K
    from switchkd.report.rounds import WatchedEngine

    pair, prompts = options.load()
    with console.status(f"rolling out {len(prompts)} prompts, several times ...") as status:
        engine = engine_of(options, pair, MARGIN_TOP_K)
        yield pair, WatchedEngine(engine, console, status), prompts


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def _where(place: Path, plot: Path | None) -> str:
    from switchkd.report.plots import NO_PLOT

    return f"the numbers are in {place}" + (f", drawn in {plot}" if plot else f"; {NO_PLOT}")
