"""The command line: thin commands over the package. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from switchkd import __version__
from switchkd.cli.compare import compare
from switchkd.cli.evaluate import evaluate
from switchkd.cli.foreseen import foreseen
from switchkd.cli.help import OUTPUT, POLICY, Command, Commands, example, option
from switchkd.cli.judge import judge
from switchkd.cli.measure import calibrate, diagnose
from switchkd.cli.options import (
    POLICY_OPTIONS,
    PairAndPrompts,
    RunDevice,
    Set,
    engine_of,
    new_console,
    policy_named,
    quiet_transformers,
    with_options,
)
from switchkd.cli.plan import plan
from switchkd.cli.report import report
from switchkd.cli.serve import serve
from switchkd.cli.start import init, methods, recipes, settings
from switchkd.errors import Stopped, UserError

USER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"
TRAIN, MEASURE, LISTS = "Train", "Measure", "Look up"

app = typer.Typer(
    help="Distil language models with the teacher in the loop of the student's own generation.",
    no_args_is_help=True,
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 2 where the person made a mistake, 130 after Ctrl-C, 1 for whatever else went wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    # Set before a package does it: absl, which ROUGE brings in, would put a level and a logger's name before each warning.
    logging.basicConfig(format="%(message)s")
    if not debug:
        _silence_developers_warnings()
    try:
        # --debug may stand anywhere: it is what people add to the end of a command that failed.
        app([argument for argument in given if argument != DEBUG], prog_name="switchkd")
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            _say("stopped by Ctrl-C")
        raise
    except (UserError, Stopped) as message:
        if debug:
            raise
        _say(str(message))
        sys.exit(USER_ERROR if isinstance(message, UserError) else INTERRUPTED)
    except Exception as error:
        # A traceback helps a developer alone, and a developer asks for it.
        if debug:
            raise
        if sentence := foreseen(error):
            _say(sentence)
            sys.exit(USER_ERROR)
        _say(f"{type(error).__name__}: {error}; this should not happen: run again with {DEBUG} to see where")
        sys.exit(OTHER_ERROR)
    sys.exit(0)


def _silence_developers_warnings() -> None:
    """Keep from the reader what other packages tell those who program with them."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(peft|transformers|accelerate|torch|bitsandbytes)\b"
    )


def _say(sentence: str) -> None:
    Console(stderr=True).print(Text(f"switchkd: {sentence}"), soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"switchkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, option(None, "", "Show the version.", "--version", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, option(None, "", "Show tracebacks; may stand anywhere.", DEBUG)] = False,
) -> None:
    pass


for prepare, shown in (
    (init, "init world:student world:teacher world:train -o run.yaml"),
    (plan, "plan Qwen2.5-0.5B Qwen2.5-7B --gpus 8 --memory 80GiB --link nvlink"),
):
    app.command(cls=Command, rich_help_panel=TRAIN, epilog=example(shown))(prepare)


@app.command(cls=Command, rich_help_panel=TRAIN, epilog=example("train run.yaml --set max_steps=100"))
def train(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="The run: models, data and settings; or recipe:NAME.")
    ],
    assignments: Set = [],  # noqa: B006 - typer makes a new one for each call
    data_dir: Annotated[Path | None, option(None, "FOLDER", "As data_dir in the run file.")] = None,
    skip_bad_rows: Annotated[bool, option(None, "", "As skip_bad_rows in the run file.", "--skip-bad-rows")] = False,
    device: RunDevice = None,
    resume: Annotated[bool, option(None, "", "Go on from the last complete checkpoint.", "--resume")] = False,
) -> None:
    """Train a student as a run file says. Ctrl-C finishes the step, saves and stops."""
    from switchkd.run.file import read_run
    from switchkd.run.launch import train_run

    quiet_transformers()
    run = read_run(run_file, assignments)
    options = {"data_dir": data_dir and str(data_dir), "skip_bad_rows": skip_bad_rows or None, "device": device}
    # What was not given on the command line leaves the run file as it is.
    run = run.changed({key: value for key, value in options.items() if value is not None}, "on the command line")
    train_run(run, new_console(), resume=resume)


app.command(
    cls=Command,
    rich_help_panel=TRAIN,
    epilog=example("serve --teacher Qwen/Qwen3-8B --student runs/run --dtype bfloat16"),
)(serve)

app.command(
    "eval", cls=Command, rich_help_panel=MEASURE, epilog=example("eval runs/run --sets dolly,vicuna --with-start")
)(evaluate)
app.command(
    cls=Command,
    rich_help_panel=MEASURE,
    epilog=example("judge a/answers_dolly.jsonl b/answers_dolly.jsonl --url https://api.openai.com/v1 --model NAME"),
)(judge)


@app.command(
    cls=Command,
    context_settings=POLICY_OPTIONS,
    rich_help_panel=MEASURE,
    epilog=example("rollout --student world:student --teacher world:teacher --data world:test --limit 2"),
)
@with_options
def rollout(
    options: PairAndPrompts,
    context: typer.Context,
    policy: Annotated[
        str,
        option(
            POLICY,
            "NAME",
            "Who writes: student, teacher, switch, adaswitch, interleave, mix (at random), early, late, "
            "trust_region_blend, module:NAME, or a mapping as in a run file. Its settings are options too, such as "
            "--threshold 0.3: switchkd settings policy lists them.",
        ),
    ] = "switch",
    output: Annotated[Path, option(OUTPUT, "FILE", "The file of rollouts, one JSON object a line.")] = Path(
        "rollouts.jsonl"
    ),
    force: Annotated[bool, option(OUTPUT, "", "Replace a file that is there.", "--force")] = False,
    show: Annotated[
        int,
        option(
            OUTPUT,
            "N",
            "Show the first rollouts, this many; the file has both models' five likeliest tokens in these.",
            min=0,
        ),
    ] = 10,
) -> None:
    """Roll out prompts without training: who wrote which token, as JSON lines and in color."""
    from switchkd.report.terminal import print_rollouts
    from switchkd.rollout.jsonl import write_rollouts
    from switchkd.rollout.second_reading import read_again

    quiet_transformers()
    writer = policy_named(policy, context)
    if writer.needs_teacher and options.teacher is None:
        raise UserError(f"--policy {policy} needs a teacher; give --teacher, or --policy student")
    # In a run's folder, this may be the file of the run itself.
    if output.exists() and not force:
        raise UserError(f"{output} is there already; give another --output, or --force to replace it")
    sampling = options.sampling
    pair, prompts = options.load()
    assert pair.tokenizer is not None
    console = new_console()
    with console.status("rolling out ..."):
        rollouts = engine_of(options, pair).generate(prompts, writer, sampling, seed=options.seed)
        readings = read_again(pair, rollouts[:show], sampling)
    write_rollouts(rollouts, pair.tokenizer, output, readings)
    print_rollouts(rollouts, pair.tokenizer, console, shown=show)
    console.print(Text(f"{len(rollouts)} rollouts are in {output}"), soft_wrap=True)


_world = "--student world:student --teacher world:teacher --data world:train"
for measure, shown in (
    (calibrate, f"calibrate {_world} --teacher-share 0.2"),
    (diagnose, f"diagnose {_world} --limit 16"),
):
    app.command(cls=Command, context_settings=POLICY_OPTIONS, rich_help_panel=MEASURE, epilog=example(shown))(measure)

app.command(cls=Command, rich_help_panel=MEASURE, epilog=example("report runs/switch runs/gkd"))(report)


for look_up, shown in (
    (methods, "methods adaswitch"),
    (settings, "settings policy"),
    (recipes, "recipes paper/gpt2 > run.yaml"),
):
    app.command(cls=Command, rich_help_panel=LISTS, epilog=example(shown))(look_up)


app.command(cls=Command, rich_help_panel=TRAIN, epilog=example("compare studies/methods.yaml --dry-run"))(compare)


@app.command(cls=Command, rich_help_panel=TRAIN, epilog=example("demo --steps 20"))
def demo(
    output: Annotated[Path, option(None, "FOLDER", "The demo's folder; a finished demo there is replaced.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, option(None, "N", "Training steps.", min=1)] = None,
    seed: Annotated[int | None, option(None, "N", "Seed of the training.")] = None,
    limit: Annotated[int | None, option(None, "N", "Rows of the test set that are answered.", min=2)] = None,
    device: RunDevice = None,
) -> None:
    """Distil the embedded student with prompts alone, by SWITCH and on-policy side by side: minutes on two CPU cores."""
    from switchkd.cli.demo import run_demo

    quiet_transformers()
    changes = {"output_dir": str(output), "steps": steps, "seed": seed, "limit": limit, "device": device}
    run_demo({key: value for key, value in changes.items() if value is not None}, new_console())


if __name__ == "__main__":
    main()
