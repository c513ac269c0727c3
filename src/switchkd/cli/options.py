"""What the commands share: their options, the console, and how a pair and its prompts come from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from switchkd.cli.help import DEVICE, MODELS, OUTPUT, PROMPTS, SAMPLING, option
from switchkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from switchkd.data.examples import Rendering
    from switchkd.models.pair import ModelPair
    from switchkd.models.placement import Placement
    from switchkd.records import Prompt, Sampling
    from switchkd.rollout.law import Policy
    from switchkd.rollout.speculative import SpeculativeEngine

Set = Annotated[
    list[str],
    option(None, "KEY=VALUE", "Put a value over the run file's, such as policy.keep_top_k=10; repeatable.", "--set"),
]
DataDir = Annotated[
    Path | None, option(PROMPTS, "FOLDER", "Folder of the instruction sets; else SWITCHKD_DATA_DIR or the hub.")
]
Device = Annotated[str, option(DEVICE, "NAME", "cpu, cuda, cuda:1, mps; auto: the first there of cuda, mps, cpu.")]
RunDevice = Annotated[
    str | None, option(None, "NAME", "As device in the run file: auto, cpu, cuda or mps.", "--device")
]
Precision = Annotated[str, option(DEVICE, "NAME", "float32, bf16 (autocast), or auto: bf16 on CUDA, else float32.")]
Dtype = Annotated[
    str | None, option(DEVICE, "NAME", "Type of the student's weights: float32, bfloat16, ...; else float32.")
]
TrustRemoteCode = Annotated[bool, option(MODELS, "", "Run code that comes with a model.", "--trust-remote-code")]
MaxPromptTokens = Annotated[int, option(PROMPTS, "N", "Longest prompt, in tokens.", min=1)]
MaxNewTokens = Annotated[int, option(SAMPLING, "N", "Longest response, in tokens.", min=1)]
Temperature = Annotated[float, option(SAMPLING, "X", "Sampling temperature; 0 is greedy.", min=0)]
TopP = Annotated[float, option(SAMPLING, "X", "Nucleus; 1 keeps every token.")]
RolloutRows = Annotated[int, option(DEVICE, "N", "Texts in flight at a time; bounds memory, changes no token.", min=1)]
Compile = Annotated[
    str, option(DEVICE, "WORD", "Rollouts as graphs of the device: true, false, or auto (on CUDA). Changes no token.")
]
SkipBadRows = Annotated[
    bool, option(PROMPTS, "", "Leave out rows that cannot be used; else refuse them.", "--skip-bad-rows")
]
TemplateFrom = Annotated[str, option(PROMPTS, "NAME", "Chat template: student (the model's own), teacher, or a file.")]
ChatTemplateKwargs = Annotated[
    str, option(PROMPTS, "MAPPING", "Keywords of the chat template: '{enable_thinking: false}'.")
]
AddBos = Annotated[
    str, option(PROMPTS, "WORD", "Begin-of-text before plain prompts: auto (as the tokenizer), always, never.")
]
Limit = Annotated[int | None, option(PROMPTS, "N", "Take only the first rows of each set.", min=1)]


def new_console() -> Console:
    """The terminal, or the file or pipe that stands in for it."""
    return Console(highlight=False)


def quiet_transformers() -> None:
    """Silence what transformers tells developers; the commands say what people need."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@dataclass(frozen=True)
class PairAndPrompts:
    """The options that several commands share: a pair, its prompts, and how responses are drawn; see `with_options`."""

    student: Annotated[str, option(MODELS, "MODEL", "Hub id, folder, .gguf file, package:NAME or world:student.")]
    teacher: Annotated[str | None, option(MODELS, "MODEL", "As --student; --policy student needs none.")] = None
    prompt: Annotated[list[str] | None, option(PROMPTS, "TEXT", "A prompt as it is; repeatable.")] = None
    data: Annotated[
        str | None, option(PROMPTS, "DATA", "Prompts of a set: NAME, NAME:SPLIT, a file or a hub name.")
    ] = None
    limit: Limit = None
    data_dir: DataDir = None
    # In --help a command's own options stand here.
    _: KW_ONLY
    max_prompt_tokens: MaxPromptTokens = 256
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, option(SAMPLING, "N", "Tokens kept; 0 keeps every token.", min=0)] = 0
    seed: Annotated[int, option(SAMPLING, "N", "Seed of the draws.")] = 0
    template_from: TemplateFrom = "student"
    chat_template_kwargs: ChatTemplateKwargs = "{}"
    add_bos: AddBos = "auto"
    skip_bad_rows: SkipBadRows = False
    device: Device = "auto"
    precision: Precision = "auto"
    dtype: Dtype = None
    rollout_rows: RolloutRows = 64
    compile: Compile = "auto"
    trust_remote_code: TrustRemoteCode = False

    @property
    def sampling(self) -> Sampling:
        """How responses are drawn; raises UserError for values out of range."""
        from switchkd.records import Sampling

        return Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def load(self) -> tuple[ModelPair, list[Prompt]]:
        """The pair and the prompts; raises UserError unless these were given either as text or as a data set."""
        from switchkd.data.examples import to_examples
        from switchkd.data.rows import read_rows
        from switchkd.data.sets import resolve
        from switchkd.models.chat import set_template
        from switchkd.models.load import load_pair

        if bool(self.prompt) == (self.data is not None):
            raise UserError("give the prompts either with --prompt or with --data")
        rows = (
            read_rows([{"prompt": text} for text in self.prompt or ()])
            if self.data is None
            else resolve(self.data, data_dir=self.data_dir, limit=self.limit)
        )
        pair = load_pair(self.student, self.teacher, placement=placed(self), trust_remote_code=self.trust_remote_code)
        assert pair.tokenizer is not None
        set_template(pair.tokenizer, pair.teacher_tokenizer, self.template_from)
        loaded = to_examples(
            rows,
            pair.tokenizer,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_new_tokens,
            skip_bad_rows=self.skip_bad_rows,
            need_response=False,
            rendering=rendered(self),
        )
        return pair, [example.prompt for example in loaded.examples]


@dataclass(frozen=True)
class MeasuredPair(PairAndPrompts):
    """As `PairAndPrompts`, for the commands that measure: these need the teacher."""

    teacher: Annotated[str, option(MODELS, "MODEL", "As --student.")] = field()
    # A whole data set would take hours, and the numbers settle long before.
    limit: Limit = 64


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `switchkd eval`; see `with_options`."""

    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="A run's folder, a model folder, a hub id, ...; or several.")
    ]
    sets: Annotated[
        str, option(PROMPTS, "DATA,...", "Sets: dolly, selfinst, vicuna, sni, unni, world, a file or a hub name.")
    ]
    with_start: Annotated[
        bool, option(MODELS, "", "Beside a run: the student that it started from.", "--with-start")
    ] = False
    with_teacher: Annotated[bool, option(MODELS, "", "Beside a run: its teacher.", "--with-teacher")] = False
    baseline: Annotated[
        str | None,
        option(MODELS, "MODEL", "Of several, the one that differences are to: by default the table's first."),
    ] = None
    data_dir: DataDir = None
    seeds: Annotated[str, option(SAMPLING, "N,...", "Seeds of the sampling.")] = "10,20,30,40,50"
    limit: Limit = None
    max_prompt_tokens: MaxPromptTokens = 256
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    no_repeat_ngram: Annotated[
        int, option(SAMPLING, "N", "Forbid repeated n-grams; published tables use 6.", min=0)
    ] = 0
    match: Annotated[
        str,
        option(OUTPUT, "WORD", "Exact match by text, numeric: numbers count by their value, or lines: in any order."),
    ] = "text"
    eval_scores: Annotated[
        str, option(OUTPUT, "NAME,...", "Scores beside these: module:FUNCTION, which takes prompt, answer, references.")
    ] = ""
    chat_template_kwargs: Annotated[
        str | None, option(PROMPTS, "MAPPING", "As in the run file; of a run's folder by default the run's.")
    ] = None
    add_bos: Annotated[
        str | None, option(PROMPTS, "WORD", "auto, always or never; of a run's folder by default the run's, else auto.")
    ] = None
    rollout_rows: RolloutRows = 32
    compile: Compile = "auto"
    output: Annotated[
        Path | None, option(OUTPUT, "FOLDER", "Folder for eval.json and the answers; by default MODEL/eval.")
    ] = None
    force: Annotated[bool, option(OUTPUT, "", "Replace another evaluation that is there.", "--force")] = False
    device: Device = "auto"
    precision: Precision = "auto"
    dtype: Dtype = None
    trust_remote_code: TrustRemoteCode = False


def rendered(options: PairAndPrompts | EvaluationOptions) -> Rendering:
    """How rows become text, as a command's options say; raises UserError where they cannot."""
    from switchkd.data.examples import Rendering

    try:
        keywords = yaml.safe_load(options.chat_template_kwargs or "{}")
    except yaml.YAMLError:
        keywords = None
    if not isinstance(keywords, dict):
        given = options.chat_template_kwargs
        raise UserError(f"--chat-template-kwargs is {given!r}; give a mapping, such as '{{enable_thinking: false}}'")
    add_bos: Any = options.add_bos or "auto"
    return Rendering(keywords, add_bos)


def placed(options: PairAndPrompts | EvaluationOptions) -> Placement:
    """Device and precision as a command's options say."""
    from switchkd.models.placement import placement_of

    return placement_of(device=options.device, precision=options.precision, dtype=options.dtype)


def engine_of(options: PairAndPrompts | EvaluationOptions, pair: ModelPair, margin_top_k: int = 0) -> SpeculativeEngine:
    """The engine for a pair as a command's options say."""
    from switchkd.rollout.speculative import SpeculativeEngine

    compile: Any = {"true": True, "false": False}.get(options.compile, options.compile)
    return SpeculativeEngine(pair, max_rows=options.rollout_rows, margin_top_k=margin_top_k, compile=compile)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: the fields of its first parameter, a dataclass, become options beside its own."""
    shared_by, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(shared_by.annotation, eval_str=True).parameters

    @wraps(command)
    def with_plain_options(**given: Any) -> None:
        command(shared_by.annotation(**{name: given.pop(name) for name in shared}), **given)

    # Python wants required parameters first and keyword-only ones last; sorting is stable and leaves the others in order.
    parameters = sorted(
        [*shared.values(), *own], key=lambda each: (each.kind, each.default is not inspect.Parameter.empty)
    )
    with_plain_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_plain_options


# A policy's settings are options as well, --keep-top-k for keep_top_k. They are known only once the policy is, which may come from
# another package, so they reach the command unparsed.
POLICY_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


def policy_settings(context: typer.Context, policy: str) -> dict[str, Any]:
    """What was given as --KEY VALUE beyond a command's own options; raises UserError for what no policy takes."""
    from switchkd.rollout.policies import POLICIES
    from switchkd.settings.components import settings_of

    words = [part for each in context.args for part in (each.split("=", 1) if each.startswith("--") else [each])]
    known = {key for each in POLICIES.values() for key in settings_of(each)}
    settings = {}
    for word, text in zip(words[::2], [*words[1::2], None], strict=False):
        key = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or (policy in POLICIES and key not in known):
            options = [name for each in context.command.params for name in each.opts]
            every = [*options, *(f"--{name.replace('_', '-')}" for name in known)]
            raise UserError(f"there is no option {word!r}{did_you_mean(word, every)}")
        if text is None:
            raise UserError(f"option {word} needs a value")
        try:
            settings[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{word} is {text!r}, which cannot be read; give a value as in a run file") from None
    return settings


def policy_named(name: str, context: typer.Context) -> Policy:
    """The policy that --policy names (or describes, as a mapping), with its settings; raises UserError where they do not fit."""
    from switchkd.rollout.policies import POLICY

    return POLICY.make({**POLICY.as_mapping(name), **policy_settings(context, name)})
