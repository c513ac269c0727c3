"""A first run file for a pair and its data: which values fit, and the file with a reason beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from switchkd.data.columns import guessed_columns, with_columns
from switchkd.data.examples import Rendering, to_examples
from switchkd.data.rows import Rows
from switchkd.data.sets import resolve
from switchkd.data.shapes import has_answers, is_chat
from switchkd.errors import UserError
from switchkd.models.chat import set_template, template_difference
from switchkd.models.load import load_tokenizer
from switchkd.models.pair import check_tokenizers_agree, id_count, parameter_count
from switchkd.models.placement import Placement
from switchkd.models.sources import find_source
from switchkd.settings.paper import DEFAULT_SHARE
from switchkd.training.learning_rate import ADAPTER, usual_rates

# Enough rows to know their columns and lengths by.
_ROWS_READ = 2000
_ANY_LENGTH = 1 << 30
_STEP = 32
LONGEST_PROMPT, LONGEST_RESPONSE, USUAL_RESPONSE = 2048, 512, 256
_LORA = "{r: 16, lora_alpha: 32, target_modules: all-linear}"


@dataclass(frozen=True)
class Size:
    """What a model takes: parameters, positions (None: as many as one likes), and bytes a token of its cache and activations."""

    parameters: int
    positions: int | None
    cache: int
    activations: int
    usual_rate: float


@dataclass(frozen=True)
class Data:
    """What was found in the rows: columns to map, whether there are chats and answers, and lengths in tokens."""

    rows: int
    columns: dict[str, str]
    chats: bool
    answers: bool
    bad: int
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    template_from: str
    template_kwargs: dict[str, Any]


def draft_run(student: str, teacher: str, data: str, place: Placement) -> str:
    """A run file as text, with values that fit the pair, the data and the free memory of a device.

    Raises UserError where models or data cannot be read, the vocabularies differ, or no column holds a prompt.
    """
    tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    check_tokenizers_agree(tokenizer, teacher_tokenizer, min(id_count(tokenizer), id_count(teacher_tokenizer)))
    found = _read(data, tokenizer, teacher_tokenizer)
    return _written(student, teacher, data, found, _fitting(size_of(student), size_of(teacher), found, place))


def size_of(name: str) -> Size:
    """What a model takes, from its configuration alone: no weight is read. Raises UserError where it has none."""
    source = find_source(name)
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(source.place, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the configuration of model {name!r} cannot be read: {error}") from error
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers, key_values = text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads
    return Size(
        parameter_count(model),
        getattr(text, "max_position_embeddings", None),
        # Keys and values; docs/gpu.md has the formula, and that of activations.
        cache=layers * key_values * width * 8,
        activations=34 * text.hidden_size * layers * 2,
        usual_rate=usual_rates(model).default,
    )


# ------ data


def _read(data: str, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> Data:
    source = resolve(data, "train")
    first = source[:_ROWS_READ]
    if not first:
        raise UserError(f"{data} holds no rows; give data with at least one")
    columns = guessed_columns(first, data)
    rows = with_columns(Rows(lambda: iter(first), len(first)), columns)
    chats, answers = any(map(is_chat, rows)), has_answers(rows)
    template_from = "student"
    if chats and teacher_tokenizer.chat_template:
        own = tokenizer.chat_template and not template_difference(tokenizer, teacher_tokenizer, {})
        template_from = "student" if own else "teacher"
    set_template(tokenizer, teacher_tokenizer, template_from)
    # A thought would fill the whole rollout.
    thinks = chats and "enable_thinking" in str(tokenizer.chat_template)
    template_kwargs = {"enable_thinking": False} if thinks else {}
    loaded = to_examples(
        rows,
        tokenizer,
        max_prompt_tokens=_ANY_LENGTH,
        max_response_tokens=_ANY_LENGTH,
        need_response=answers,
        skip_bad_rows=True,
        rendering=Rendering(template_kwargs),
    )
    prompts, responses = (tuple(sorted(each)) for each in zip(*loaded.examples.lengths(), strict=True))
    return Data(
        len(source),
        columns,
        chats,
        answers,
        len(loaded.skipped),
        prompts,
        responses if answers else (),
        template_from,
        template_kwargs,
    )


# ------ values


def free_bytes(device: torch.device) -> int:
    """The memory that is free: of the card, or else of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass(frozen=True)
class Fit:
    """The values that fit, and the bytes behind them."""

    prompt: int
    response: int
    rollout_rows: int
    batch: int
    accumulation: int
    adapter: bool
    learning_rate: float
    needed: float
    free: float
    place: Placement


def _fitting(student: Size, teacher: Size, data: Data, place: Placement) -> Fit:
    room = min((each.positions for each in (student, teacher) if each.positions), default=1 << 20)
    response = _rounded(_at(data.responses, 0.95)) if data.responses else USUAL_RESPONSE
    response = max(1, min(response, LONGEST_RESPONSE, room // 2))
    prompt = max(1, min(_rounded(data.prompts[-1]), LONGEST_PROMPT, room - response))
    tokens, free = prompt + response, free_bytes(place.device)
    teacher_bytes = teacher.parameters * (2 if place.teacher_dtype == torch.bfloat16 else 4)
    # Weights, gradients and two moments of AdamW in float32; of an adapter, next to nothing but bf16 weights.
    whole, with_adapter = teacher_bytes + 16 * student.parameters, teacher_bytes + 2 * student.parameters
    adapter = whole > 0.8 * free and with_adapter < whole
    needed = with_adapter if adapter else whole
    left = max(free - needed, 0.0)
    return Fit(
        prompt,
        response,
        rollout_rows=_power(left / 2 / ((student.cache + teacher.cache) * tokens), 64),
        batch=(batch := min(_power(left / 4 / (student.activations * tokens), 8), _power(data.rows, 8))),
        accumulation=max(1, min(8 if place.device.type == "cpu" else 64, _power(data.rows, 64)) // batch),
        adapter=adapter,
        learning_rate=ADAPTER.default if adapter else student.usual_rate,
        needed=needed,
        free=free,
        place=place,
    )


def _at(lengths: Sequence[int], share: float) -> int:
    return lengths[min(int(len(lengths) * share), len(lengths) - 1)]


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _power(most: float, limit: int) -> int:
    """The largest power of two of at most `most` and `limit`; 1 at least."""
    power = 1
    while power * 2 <= min(most, limit):
        power *= 2
    return power


# ------ the file


def _written(student: str, teacher: str, data: str, found: Data, fit: Fit) -> str:
    lines = [
        "# Written by switchkd init. `switchkd train` runs it; `switchkd settings NAME` explains a setting.",
        f"# Models{' with AdamW' if not fit.adapter else ''} take about {_bytes(fit.needed)}; {fit.place.device} has "
        f"{_bytes(fit.free)} free.",
        _line("student", student),
        _line("teacher", teacher, "the vocabularies agree"),
        "",
        *_data_lines(data, found, fit),
        "",
        "method: switch                  # others: switchkd methods",
        "# threshold: 0.3                # in nats; left out, it is found for "
        f"{DEFAULT_SHARE:.0%} of the tokens by the teacher",
        "",
        *_training_lines(found, fit),
    ]
    return "\n".join(lines) + "\n"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _data_lines(data: str, found: Data, fit: Fit) -> list[str]:
    kind = "chats" if found.chats else "prompts"
    lines = [_line("train_data", data, f"{found.rows:,} rows: {kind} with{'' if found.answers else 'out'} answers")]
    if found.columns:
        lines.append(_line("columns", found.columns, "our names: your names"))
    if found.template_from != "student":
        lines.append(_line("template_from", found.template_from, "student's chat template is missing or another"))
    if found.template_kwargs:
        lines.append(_line("chat_template_kwargs", found.template_kwargs, "thoughts would fill the rollouts"))
    lines.append(_line("max_prompt_tokens", fit.prompt, f"the longest prompt read has {found.prompts[-1]:,}"))
    if found.bad or fit.prompt < found.prompts[-1] or found.rows > _ROWS_READ:
        longer = sum(length > fit.prompt for length in found.prompts)
        read = f"of the first {_ROWS_READ:,} rows" if found.rows > _ROWS_READ else "of the rows"
        reason = f"{read}, {found.bad} have faults and {longer} are too long"
        lines.append(_line("skip_bad_rows", True, reason))
    share = (
        f"95 % of the answers have at most {_at(found.responses, 0.95):,}" if found.responses else "no answers to go by"
    )
    return [*lines, _line("max_new_tokens", fit.response, share)]


def _training_lines(found: Data, fit: Fit) -> list[str]:
    place = fit.place
    lines = [
        f"# precision: auto               # here {'bf16 autocast' if place.autocast_dtype else 'float32'}",
        _line("rollout_rows", fit.rollout_rows, "texts in flight; bounds memory, changes no token"),
        _line("per_device_train_batch_size", fit.batch),
        _line("gradient_accumulation_steps", fit.accumulation, f"{fit.batch * fit.accumulation} texts a step"),
    ]
    if place.device.type == "cuda":
        lines.append(_line("activation_checkpointing", True))
    if fit.adapter:
        lines += [
            "# The whole model with AdamW does not fit, so an adapter is trained (needs the extra peft).",
            f"peft: {_LORA}",
            "dtype: bfloat16                 # frozen weights lose nothing by it",
        ]
    else:
        lines.append(f"# peft: {_LORA}   # an adapter; then learning_rate: {ADAPTER.default:g}")
    lines.append(_line("learning_rate", fit.learning_rate, "usual for what is trained"))
    long = found.rows > 500 * fit.batch * fit.accumulation
    return [*lines, _line("max_steps", 500) if long else _line("num_train_epochs", 1), _line("seed", 10)]


def _line(key: str, value: Any, why: str = "") -> str:
    given = yaml.safe_dump(
        {key: value}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=_ANY_LENGTH
    ).strip()[1:-1]
    return f"{given:<31} # {why}" if why else given
