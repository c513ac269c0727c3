"""`switchkd eval`: the scores of a model's answers, or of several models' side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from switchkd.cli.options import (
    EvaluationOptions,
    engine_of,
    new_console,
    placed,
    quiet_transformers,
    rendered,
    with_options,
)
from switchkd.errors import UserError

if TYPE_CHECKING:
    from switchkd.data.examples import Rendering
    from switchkd.data.rows import SourceRow
    from switchkd.evaluation.score import Evaluation, EvaluationSettings, SetResult

START, TEACHER = "start", "teacher"


@with_options
def evaluate(options: EvaluationOptions) -> None:
    """Score answers: ROUGE-L and exact match over seeds, of one model or of several on the same rows."""
    from switchkd.data.sets import resolve
    from switchkd.evaluation.answers import answers_file, check_files, read_answers
    from switchkd.evaluation.comparison import compare_answers
    from switchkd.evaluation.kept import sets_that_stay
    from switchkd.models.sources import find_source

    quiet_transformers()
    settings = _settings(options)
    names = _words(options.sets)
    if not names:
        raise UserError(f"--sets is {options.sets!r}; name at least one set, such as dolly or world")
    models = _models(options)
    if options.baseline is not None and options.baseline not in models:
        raise UserError(f"--baseline is {options.baseline!r}; it has to be one of {', '.join(models)}")
    # A mistyped name must not wait for the answers of the models before it.
    for model in models.values():
        find_source(model)
    rows = {name: resolve(name, "eval", data_dir=options.data_dir, limit=options.limit) for name in names}
    folders = _folders(models, options)
    how = {
        label: replace(settings, rendering=_rendering_of(model if label == model else options.models[0], options))
        for label, model in models.items()
    }
    # All folders are looked into before the first model answers.
    stay = {
        label: sets_that_stay(folders[label], model, how[label], options.limit, force=options.force)
        for label, model in models.items()
    }
    for label, folder in folders.items():
        check_files([*stay[label], *names], folder)
    console = new_console()
    for label, model in models.items():
        evaluation = _evaluated(model, rows, how[label], stay[label], options, folders[label], console)
        if len(models) == 1:
            console.print(evaluation.table())
    if len(models) > 1:
        answers = {
            label: {name: read_answers(answers_file(folder, name)) for name in names}
            for label, folder in folders.items()
        }
        comparison = compare_answers(answers, options.baseline)
        console.print(comparison.table())
        path = comparison.save(options.output or folders[options.models[0]])
        console.print(Text(f"the comparison is in {path}"), soft_wrap=True)
    where = ", ".join(dict.fromkeys(map(str, folders.values())))
    console.print(Text(f"answers and scores are in {where}"), soft_wrap=True)


def _settings(options: EvaluationOptions) -> EvaluationSettings:
    from switchkd.evaluation.measures import scores_named
    from switchkd.evaluation.score import EvaluationSettings
    from switchkd.records import Sampling

    ngram = options.no_repeat_ngram
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, no_repeat_ngram_size=ngram)
    seeds = _whole_numbers("--seeds", options.seeds)
    match: Any = options.match
    scores = scores_named(_words(options.eval_scores))
    return EvaluationSettings(sampling, seeds, options.max_prompt_tokens, rendered(options), match, scores)


def _rendering_of(model: str, options: EvaluationOptions) -> Rendering:
    """How prompts are rendered for a model: as the options say, else as its run's file, so that it is asked as it was trained."""
    from switchkd.data.examples import Rendering
    from switchkd.run.file import read_mapping
    from switchkd.run.folder import RUN_FILE

    said, run = rendered(options), Path(model) / RUN_FILE
    values = read_mapping(run) if run.is_file() else {}
    kwargs = said.template_kwargs if options.chat_template_kwargs else values.get("chat_template_kwargs") or {}
    return Rendering(kwargs, said.add_bos if options.add_bos else values.get("add_bos") or "auto")


def _models(options: EvaluationOptions) -> dict[str, str]:
    """The models by label, in the order of the table: a run's start first, the models as given, the teacher last."""
    given = {name: name for name in options.models}
    if not (options.with_start or options.with_teacher):
        return given
    for label, added in ((START, options.with_start), (TEACHER, options.with_teacher)):
        if added and label in given:
            raise UserError(
                f"a model is called {label!r} as the table calls what --with-{label} adds; name it ./{label}"
            )
    from switchkd.run.file import read_mapping
    from switchkd.run.folder import RUN_FILE

    run = next((Path(name) / RUN_FILE for name in options.models if (Path(name) / RUN_FILE).is_file()), None)
    if run is None:
        raise UserError(
            f"--with-start and --with-teacher read {RUN_FILE} in a run's folder, and {options.models[0]} has none; "
            f"name the start and the teacher as models"
        )
    values = read_mapping(run)
    if options.with_start and values.get("student_drop_layers"):
        raise UserError(
            "the run removed layers from its student at the start, which no file keeps; leave --with-start out"
        )
    if options.with_teacher and values.get("teachers"):
        raise UserError(
            f"the run in {run.parent} has several teachers ({', '.join(map(str, values['teachers']))}); leave --with-teacher "
            f"out, and name those to be measured as models"
        )
    if options.with_teacher and values.get("teacher") in (None, "self"):
        raise UserError(f"the run in {run.parent} names no teacher ({values.get('teacher')}); leave --with-teacher out")
    start = {START: str(values["student"])} if options.with_start else {}
    return {**start, **given, **({TEACHER: str(values["teacher"])} if options.with_teacher else {})}


def _folders(models: Mapping[str, str], options: EvaluationOptions) -> dict[str, Path]:
    """Where each model's answers and scores go."""
    if options.output is not None and len(models) > 1:
        folders = {label: options.output / file_name(label) for label in models}
        if len(set(folders.values())) < len(folders):
            raise UserError("two of the models would share a folder in --output; leave --output out")
        return folders
    folders = {label: options.output or _beside(label) for label in options.models}
    # Start and teacher belong to the run that they were measured for.
    return {label: folders.get(label, folders[options.models[0]] / label) for label in models}


def _beside(model: str) -> Path:
    return Path(model) / "eval" if Path(model).is_dir() else Path("runs") / f"eval-{file_name(model)}"


def _evaluated(
    model: str,
    rows: Mapping[str, Sequence[SourceRow]],
    settings: EvaluationSettings,
    earlier: Mapping[str, SetResult],
    options: EvaluationOptions,
    folder: Path,
    console: Console,
) -> Evaluation:
    from switchkd.evaluation.score import evaluate as score
    from switchkd.models.load import load_pair, load_tokenizer

    pair = load_pair(model, None, placement=placed(options), trust_remote_code=options.trust_remote_code)
    assert pair.tokenizer is not None
    if model not in options.models and not pair.tokenizer.chat_template:
        # A start is asked in the template that its run trained with.
        pair.tokenizer.chat_template = load_tokenizer(
            options.models[0], trust_remote_code=options.trust_remote_code
        ).chat_template
    # Refused now, not after the first sets have been answered.
    pair.check_room(options.max_prompt_tokens + options.max_new_tokens)
    if len(options.models) > 1 or options.with_start or options.with_teacher:
        console.print(Text(f"{model} is answering"), soft_wrap=True)
    evaluation = score(
        engine_of(options, pair),
        pair.tokenizer,
        rows,
        model_name=model,
        settings=settings,
        out_folder=folder,
        show_progress=console.is_terminal,
    )
    evaluation = replace(evaluation, sets={**earlier, **evaluation.sets}, limit=options.limit)
    evaluation.save(folder)
    _onto_card(Path(model), evaluation, console)
    return evaluation


def _onto_card(model: Path, evaluation: Evaluation, console: Console) -> None:
    """Put the scores into the card that training left in the model's folder, where it still has a place for them."""
    from switchkd.training.card import CARD_FILE, with_scores, write_card

    path = model / CARD_FILE
    try:
        if path.is_file() and (card := with_scores(path.read_text(encoding="utf-8"), evaluation)) is not None:
            write_card(model, card)
    except ValueError as error:
        # The scores are in eval.json, and other models may wait for their turn.
        console.print(Text(f"{path} stays as it is, since its head cannot be read: {error}"), soft_wrap=True)


def file_name(name: str) -> str:
    """A name with a dash for whatever does not belong into the name of a file."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name).strip("-")


def _words(text: str) -> list[str]:
    """What stands between commas, but for those inside of brackets and braces."""
    words, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        words = [*words, ""] if c == "," and not depth else [*words[:-1], words[-1] + c]
    return [word.strip() for word in words if word.strip()]


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers with commas between, such as 10,20,30") from None
