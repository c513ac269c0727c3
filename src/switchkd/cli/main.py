"""The command line: thin commands over the package. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from switchkd import __version__
from switchkd.cli.measure import calibrate, diagnose
from switchkd.cli.options import (
    DataDir,
    Dtype,
    Limit,
    MaxNewTokens,
    MaxPromptTokens,
    PolicyAndPrompts,
    Set,
    SkipBadRows,
    Temperature,
    TopP,
    TrustRemoteCode,
    new_console,
    quiet_transformers,
    with_options,
)
from switchkd.errors import Stopped, UserError

USER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"

app = typer.Typer(
    help="Distil language models with the teacher in the loop of the student's own generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 2 where the person made a mistake, 130 after Ctrl-C, 1 for whatever else went wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
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
        if debug:
            raise
        _say(f"{type(error).__name__}: {error}; this should not happen: run again with {DEBUG} to see where")
        sys.exit(OTHER_ERROR)
    sys.exit(0)


def _say(sentence: str) -> None:
    Console(stderr=True).print(Text(f"switchkd: {sentence}"), soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"switchkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    pass


@app.command()
def train(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="The run: models, data and settings, flat keys.")
    ],
    assignments: Set = [],  # noqa: B006 - typer makes a new one for each call
    data_dir: DataDir = None,
    skip_bad_rows: SkipBadRows = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Train a student as a run file says. Ctrl-C finishes the step, saves and stops."""
    from switchkd.run.file import read_run
    from switchkd.run.launch import train_run

    quiet_transformers()
    run = read_run(run_file, assignments)
    options = {"data_dir": data_dir and str(data_dir), "skip_bad_rows": skip_bad_rows or None}
    run = run.changed({key: value for key, value in options.items() if value is not None}, "on the command line")
    train_run(run, new_console(), resume=resume)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's folder, a model folder, a hub id, ...")],
    sets: Annotated[
        str, typer.Option(help="Sets, comma-separated: dolly,selfinst,vicuna,sni,unni, world, a file, ...")
    ],
    data_dir: DataDir = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the sampling, comma-separated.")] = "10,20,30,40,50",
    limit: Limit = None,
    max_prompt_tokens: MaxPromptTokens = 256,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="Forbid repeated n-grams; published tables use 6.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in flight at a time.")] = 32,
    output: Annotated[
        Path | None, typer.Option(help="Folder for eval.json and the answers; by default MODEL/eval.")
    ] = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a student's answers: ROUGE-L and exact match, mean and deviation over seeds."""
    from switchkd.data.sets import resolve
    from switchkd.evaluation.score import evaluate as score
    from switchkd.models.pair import load_pair
    from switchkd.records import Sampling
    from switchkd.rollout.speculative import SpeculativeEngine

    quiet_transformers()
    sampling = Sampling(max_new_tokens, temperature=temperature, top_p=top_p, no_repeat_ngram_size=no_repeat_ngram)
    seed_numbers = _whole_numbers("--seeds", seeds)
    names = [name.strip() for name in sets.split(",") if name.strip()]
    if not names:
        raise UserError(f"--sets is {sets!r}; name at least one set, such as dolly or world")
    rows = {name: resolve(name, "eval", data_dir=data_dir, limit=limit) for name in names}
    folder = output or (Path(model) / "eval" if Path(model).is_dir() else Path("runs") / f"eval-{_file_name(model)}")
    pair = load_pair(model, None, dtype=dtype, trust_remote_code=trust_remote_code)
    assert pair.tokenizer is not None
    pair.check_room(max_prompt_tokens + max_new_tokens)
    console = new_console()
    evaluation = score(
        SpeculativeEngine(pair, max_rows=batch_size),
        pair.tokenizer,
        rows,
        model_name=model,
        sampling=sampling,
        seeds=seed_numbers,
        max_prompt_tokens=max_prompt_tokens,
        batch_size=batch_size,
        out_folder=folder,
        show_progress=console.is_terminal,
    )
    console.print(evaluation.table())
    console.print(Text(f"answers and scores are in {folder}"), soft_wrap=True)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name).strip("-")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers with commas between, such as 10,20,30") from None


@app.command()
@with_options
def rollout(
    asked: PolicyAndPrompts,
    output: Annotated[Path, typer.Option(help="The file of rollouts, one JSON object a line.")] = Path(
        "rollouts.jsonl"
    ),
    show: Annotated[int, typer.Option(min=0, help="Show the text of so many rollouts.")] = 10,
) -> None:
    """Roll out prompts without training: who wrote which token, as JSON lines and in colour."""
    from switchkd.report.terminal import print_rollouts
    from switchkd.rollout.jsonl import write_rollouts
    from switchkd.rollout.speculative import SpeculativeEngine

    quiet_transformers()
    writer = asked.writer
    if writer.needs_teacher and asked.teacher is None:
        raise UserError(f"--policy {asked.policy} needs a teacher; give --teacher, or --policy student")
    sampling = asked.sampling
    pair, prompts = asked.load()
    assert pair.tokenizer is not None
    console = new_console()
    with console.status("rolling out ..."):
        rollouts = SpeculativeEngine(pair).generate(prompts, writer, sampling, seed=asked.seed)
    write_rollouts(rollouts, pair.tokenizer, output)
    print_rollouts(rollouts[:show], pair.tokenizer, console)
    console.print(Text(f"{len(rollouts)} rollouts are in {output}"), soft_wrap=True)


app.command()(calibrate)
app.command()(diagnose)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all of them as docs/methods.md has it.")] = False,
) -> None:
    """List the methods, or show one: its settings, its source and where it departs from it."""
    from switchkd.methods.table import METHODS, method_named
    from switchkd.report.methods_page import methods_page
    from switchkd.report.terminal import method_details, methods_table

    if markdown:
        typer.echo(methods_page(METHODS), nl=False)
    else:
        new_console().print(methods_table(METHODS) if name is None else method_details(name, method_named(name)))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="The run's folder; the run of an earlier demo there is replaced.")
    ] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
) -> None:
    """Distil the embedded student with SWITCH, in minutes on two CPU cores, and compare before with after."""
    from switchkd.cli.demo import run_demo

    quiet_transformers()
    changes: dict[str, Any] = {"output_dir": str(output), "max_steps": steps, "seed": seed}
    run_demo({key: value for key, value in changes.items() if value is not None}, new_console())


if __name__ == "__main__":
    main()
