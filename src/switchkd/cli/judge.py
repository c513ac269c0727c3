"""`switchkd judge`: two models' answers, compared by a third behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.text import Text

from switchkd.cli.help import OUTPUT, PROMPTS, option
from switchkd.cli.options import new_console, with_options
from switchkd.errors import UserError
from switchkd.evaluation.endpoint import KEY_ENV
from switchkd.files import json_text, now, write_atomically
from switchkd.progress import progress_bar

if TYPE_CHECKING:
    from switchkd.evaluation.judge import JudgedPair, JudgeResult

JUDGE, BUDGET = "Judge", "Budget"


@dataclass(frozen=True)
class JudgeOptions:
    """The options of `switchkd judge`; see `with_options`."""

    ours: Annotated[Path, typer.Argument(metavar="ANSWERS_A", help="An answers_....jsonl that eval wrote.")]
    theirs: Annotated[Path, typer.Argument(metavar="ANSWERS_B", help="The same set's of the other model.")]
    url: Annotated[str, option(JUDGE, "URL", "OpenAI-compatible endpoint, such as https://api.openai.com/v1.")]
    model: Annotated[str, option(JUDGE, "NAME", "The model that judges, as the endpoint calls it.")]
    key_env: Annotated[str, option(JUDGE, "VARIABLE", "The environment variable that holds the key.")] = KEY_ENV
    body: Annotated[
        str, option(JUDGE, "MAPPING", "Keys of the request: '{max_tokens: null, max_completion_tokens: 2000}'.")
    ] = "{}"
    parallel: Annotated[int, option(JUDGE, "N", "Requests in flight at a time.", min=1)] = 4
    references: Annotated[bool, option(PROMPTS, "", "Show the judge the references too.", "--references")] = False
    limit: Annotated[int | None, option(PROMPTS, "N", "Judge only the first pairs.", min=1)] = None
    max_requests: Annotated[int, option(BUDGET, "N", "Most requests to send, retries among them.", min=0)] = 1000
    max_total_tokens: Annotated[
        int | None, option(BUDGET, "N", "Stop once the endpoint has counted this many tokens.", min=1)
    ] = None
    estimate: Annotated[bool, option(BUDGET, "", "Say what it would take, and send nothing.", "--estimate")] = False
    cache: Annotated[Path, option(OUTPUT, "FOLDER", "Replies, so that nothing is paid for twice.")] = Path(
        "runs/judge-cache"
    )
    output: Annotated[
        Path | None, option(OUTPUT, "FILE", "The result; by default beside ANSWERS_A, such as judge_dolly.json.")
    ] = None


@with_options
def judge(options: JudgeOptions) -> None:
    """Let a model judge whose answers are better: A's or B's, each pair in both orders.

    A win counts only where both orders agree; else it is a tie.
    """
    from switchkd.evaluation.endpoint import Budget, ChatEndpoint
    from switchkd.evaluation.judge import Judge

    pairs, left_out = _pairs(options.ours, options.theirs, options.references)
    pairs, body = pairs[: options.limit], _mapping(options.body)
    endpoint = ChatEndpoint(options.url, options.model, options.key_env, body)
    judge = Judge(endpoint, options.cache, Budget(options.max_requests, options.max_total_tokens), options.parallel)
    console = new_console()
    if left_out:
        console.print(
            Text(f"{left_out:,} answers are left out: the other file has none to their row and seed"), soft_wrap=True
        )
    expected = judge.estimate(pairs)
    console.print(
        Text(
            f"{len(pairs):,} pairs in both orders: at least {expected.requests:,} requests, about {expected.tokens:,} tokens; "
            f"{expected.cached:,} replies are cached"
        ),
        soft_wrap=True,
    )
    if options.estimate:
        return
    with progress_bar(console) as progress:
        count = progress.counter(progress.add_task("judged", total=len(pairs)))
        result = judge.judge(pairs, count)
    # One for each set, as the answers are.
    path = options.output or options.ours.with_name(f"judge_{options.ours.stem.removeprefix('answers_')}.json")
    said: dict[str, Any] = {
        "ours": str(options.ours),
        "theirs": str(options.theirs),
        "judge": options.model,
        "url": options.url,
        "body": body,
        "references": options.references,
        "answers_left_out": left_out,
        "date": now(),
    }
    write_atomically(path, json_text({**said, **asdict(result)}, indent=1) + "\n")
    console.print(Text(_in_words(result)), soft_wrap=True)
    console.print(Text(f"the judgments are in {path}, the replies in {options.cache}"), soft_wrap=True)


def _pairs(ours: Path, theirs: Path, with_references: bool) -> tuple[list[JudgedPair], int]:
    """The answers of both to the same rows under the same seeds, in the order of ours; and how many stand in one file alone."""
    from switchkd.evaluation.answers import read_answers, same_row
    from switchkd.evaluation.judge import JudgedPair

    own, others = read_answers(ours), {(each.prompt_id, each.seed): each for each in read_answers(theirs)}
    pairs = []
    for each in own:
        if (other := others.get((each.prompt_id, each.seed))) is None:
            continue
        if not same_row(each, other):
            raise UserError(f"{each.where} is another row in {theirs} than in {ours}; give answers to the same set")
        shown = each.references if with_references else ()
        pairs.append(JudgedPair(each.prompt_id, each.seed, each.prompt, each.answer, other.answer, shown))
    if not pairs:
        raise UserError(f"{ours} and {theirs} have no row and seed in common; evaluate both with the same --seeds")
    return pairs, len(own) + len(others) - 2 * len(pairs)


def _mapping(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"--body is {text!r}; give a mapping, such as '{{temperature: null}}'")
    return values


def _in_words(result: JudgeResult) -> str:
    readable = result.wins + result.ties + result.losses
    lines = [f"A wins {result.wins}, ties {result.ties}, loses {result.losses} of {readable} pairs"]
    if (found := result.advantage) is not None:
        ends = f", 95 % interval over rows {found.low:+.1f} to {found.high:+.1f}" if found.known else ""
        lines.append(f"wins less losses: {found.mean:+.1f} % of the pairs{ends}")
    lines.append(
        f"the verdict changed with the order in {result.orders_disagree} pairs, which count as ties: the first place won "
        f"both times in {result.first_place_won}, the second in {result.second_place_won}"
    )
    if result.unreadable:
        lines.append(
            f"{result.unreadable} pairs are left out: a verdict could not be read, even after asking once more, or the endpoint "
            f"refused the pair"
        )
    lines.append(
        f"{result.requests:,} requests were sent, {result.tokens:,} tokens counted; {result.cached:,} replies were cached"
    )
    return "\n".join(lines)
