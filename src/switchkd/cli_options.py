"""What the commands share: their options, the console, and how a pair and its prompts come from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from switchkd.errors import UserError

if TYPE_CHECKING:
    from switchkd.models import ModelPair
    from switchkd.records import Prompt

Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Put a value over the run file's; repeatable.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the instruction sets; else SWITCHKD_DATA_DIR or the hub.")
]
Dtype = Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")]
MaxPromptTokens = Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus; 1 keeps every token.")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used; else refuse them.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first rows of each set.")]
Student = Annotated[str, typer.Option(help="Hub id, folder, .gguf file, package:NAME or world:student.")]
Teacher = Annotated[str, typer.Option(help="As --student.")]
PromptText = Annotated[list[str], typer.Option(help="A prompt as it is; repeatable.")]
Data = Annotated[str | None, typer.Option(help="Prompts of a set: NAME, NAME:SPLIT, a file or a hub name.")]
TopK = Annotated[int, typer.Option(min=0, help="Tokens kept; 0 keeps every token.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Decay = Annotated[str, typer.Option(help="How the threshold falls: exponential, linear or constant.")]
DecayRate = Annotated[float | None, typer.Option(help="The decay per token.")]
FinalFraction = Annotated[float | None, typer.Option(help="Threshold at the last position / at the first.")]


def new_console() -> Console:
    """The terminal, or the file or pipe that stands in for it."""
    return Console(highlight=False)


def quiet_transformers() -> None:
    """Leave out what transformers tells developers; the commands say what people need."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pair_and_prompts(
    student: str,
    teacher: str | None,
    prompt: Sequence[str],
    data: str | None,
    *,
    limit: int | None,
    data_dir: Path | None,
    max_prompt_tokens: int,
    max_new_tokens: int,
    skip_bad_rows: bool,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[ModelPair, list[Prompt]]:
    """The pair, and the prompts that were given as text or as a data set; raises UserError unless it is one of them."""
    from switchkd.data.rows import read_rows, to_examples
    from switchkd.data.sets import resolve
    from switchkd.models import load_pair

    if bool(prompt) == (data is not None):
        raise UserError("give the prompts either with --prompt or with --data")
    rows = (
        read_rows([{"prompt": text} for text in prompt])
        if data is None
        else resolve(data, data_dir=data_dir, limit=limit)
    )
    pair = load_pair(student, teacher, dtype=dtype, trust_remote_code=trust_remote_code)
    assert pair.tokenizer is not None
    loaded = to_examples(
        rows,
        pair.tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_new_tokens,
        skip_bad_rows=skip_bad_rows,
        need_response=False,
    )
    return pair, [example.prompt for example in loaded.examples]
