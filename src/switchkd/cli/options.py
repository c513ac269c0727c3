"""What the commands share: their options, the console, and how a pair and its prompts come from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from switchkd.errors import UserError

if TYPE_CHECKING:
    from switchkd.models.pair import ModelPair
    from switchkd.records import Prompt, Sampling
    from switchkd.rollout.policies import Policy

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
Decay = Annotated[str | None, typer.Option(help="switch: how the threshold falls: exponential, linear or constant.")]
DecayRate = Annotated[float | None, typer.Option(help="switch: the decay per token.")]
FinalFraction = Annotated[float | None, typer.Option(help="switch: threshold at the last position / at the first.")]


def new_console() -> Console:
    """The terminal, or the file or pipe that stands in for it."""
    return Console(highlight=False)


def quiet_transformers() -> None:
    """Leave out what transformers tells developers; the commands say what people need."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@dataclass(frozen=True)
class PairAndPrompts:
    """The options that several commands share: a pair, its prompts, and how responses are drawn; see `with_options`."""

    student: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, package:NAME or world:student.")]
    teacher: Annotated[str | None, typer.Option(help="As --student; --policy student needs none.")] = None
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt as it is; repeatable.")] = None
    data: Annotated[str | None, typer.Option(help="Prompts of a set: NAME, NAME:SPLIT, a file or a hub name.")] = None
    limit: Limit = None
    data_dir: DataDir = None
    # In --help a command's own options stand here.
    _: KW_ONLY
    max_prompt_tokens: MaxPromptTokens = 256
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, typer.Option(min=0, help="Tokens kept; 0 keeps every token.")] = 0
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0
    skip_bad_rows: SkipBadRows = False
    dtype: Dtype = "float32"
    trust_remote_code: TrustRemoteCode = False

    @property
    def sampling(self) -> Sampling:
        """How responses are drawn; raises UserError for values out of range."""
        from switchkd.records import Sampling

        return Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def load(self) -> tuple[ModelPair, list[Prompt]]:
        """The pair and the prompts; raises UserError unless these were given either as text or as a data set."""
        from switchkd.data.rows import read_rows, to_examples
        from switchkd.data.sets import resolve
        from switchkd.models.pair import load_pair

        if bool(self.prompt) == (self.data is not None):
            raise UserError("give the prompts either with --prompt or with --data")
        rows = (
            read_rows([{"prompt": text} for text in self.prompt or ()])
            if self.data is None
            else resolve(self.data, data_dir=self.data_dir, limit=self.limit)
        )
        pair = load_pair(self.student, self.teacher, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        assert pair.tokenizer is not None
        loaded = to_examples(
            rows,
            pair.tokenizer,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_new_tokens,
            skip_bad_rows=self.skip_bad_rows,
            need_response=False,
        )
        return pair, [example.prompt for example in loaded.examples]


@dataclass(frozen=True)
class PolicyAndPrompts(PairAndPrompts):
    """As `PairAndPrompts`, with the policy that writes and the settings of all policies."""

    policy: Annotated[
        str,
        typer.Option(
            help="Who writes: student, teacher, switch, adaswitch, interleave, mix (at random), early or late."
        ),
    ] = "switch"
    threshold: Annotated[float | None, typer.Option(help="switch: tau_0, in nats.")] = None
    decay: Decay = None
    decay_rate: DecayRate = None
    final_fraction: FinalFraction = None
    factor: Annotated[float | None, typer.Option(help="adaswitch: threshold / mean of the last divergences.")] = None
    window: Annotated[int | None, typer.Option(help="adaswitch: how many divergences that mean is over.")] = None
    keep_top_k: Annotated[
        int | None,
        typer.Option(
            "--teacher-top-k", help="interleave: keep the student's token if among so many best of the teacher."
        ),
    ] = None
    teacher_share: Annotated[
        float | None,
        typer.Option(help="mix, early, late: the teacher's share of tokens (of --max-new-tokens), 0 to 1."),
    ] = None

    @property
    def writer(self) -> Policy:
        """The policy; raises UserError for settings out of range, or that it does not take."""
        from switchkd.rollout.policies import policy_named

        _policy, *settings = (each.name for each in fields(self)[len(fields(PairAndPrompts)) :])
        try:
            return policy_named(self.policy, **{name: getattr(self, name) for name in settings})
        except UserError as error:
            # The one setting whose option has another name: --top-k is the sampling's.
            raise UserError(str(error).replace("keep_top_k", "--teacher-top-k")) from None


@dataclass(frozen=True)
class MeasuredPair(PairAndPrompts):
    """As `PairAndPrompts`, of the commands that measure: these need the teacher."""

    teacher: Annotated[str, typer.Option(help="As --student.")] = field()
    # A whole data set would take hours, and the numbers settle long before.
    limit: Limit = 64


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: the fields of its first parameter, a dataclass, are options beside its own."""
    asked, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(asked.annotation, eval_str=True).parameters

    @wraps(command)
    def with_plain_options(**given: Any) -> None:
        command(asked.annotation(**{name: given.pop(name) for name in shared}), **given)

    # Python wants those that are keyword-only last, and sorting leaves the others as they are.
    parameters = sorted([*shared.values(), *own], key=lambda parameter: parameter.kind)
    with_plain_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_plain_options
