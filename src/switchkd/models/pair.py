"""The pair of student and teacher: load, check, cut, save. Names are in sources.py, logits in heads.py."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from switchkd.errors import UserError
from switchkd.models.heads import Head, backbone, base_of, head_rows
from switchkd.models.layers import remove_layers
from switchkd.models.sources import Source, find_source

__all__ = [
    "Head",
    "ModelPair",
    "Source",
    "backbone",
    "check_tokenizers_agree",
    "find_source",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "parameter_count",
    "remove_layers",
    "save_model",
]


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A student, the teacher that it learns from (None: the student alone), and the tokenizer of both.

    `tokenizer` is the student's; give `teacher_tokenizer` where it was loaded separately. Constructing the pair
    raises UserError where the two tokenizers do not map the same strings to the same ids, or where a tokenizer belongs
    to another model. Vocabularies that differ by padding alone are fine: see `vocabulary_size`.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.teacher_tokenizer is not None:
            check_tokenizers_agree(self.tokenizer, self.teacher_tokenizer, self.vocabulary_size)
        if self.tokenizer is None:
            return
        for role, model in self.models.items():
            if self.tokenizer.vocab_size > head_rows(model):
                raise UserError(
                    f"the tokenizer knows {self.tokenizer.vocab_size} tokens but the {role} ({name_of(model)}) scores "
                    f"only {head_rows(model)}: they do not belong together; take a {role} of the tokenizer's family"
                )
        eos_id = self.tokenizer.eos_token_id
        if isinstance(eos_id, int) and eos_id >= self.vocabulary_size:
            raise UserError(
                f"the end-of-text token {self.tokenizer.eos_token!r} has id {eos_id}, but only ids below "
                f"{self.vocabulary_size} are known to both models, so no text could ever end; set the tokenizer's "
                f"eos_token to a token that both know"
            )

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models that there are, by role: student, then teacher."""
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    @cached_property
    def vocabulary_size(self) -> int:
        """The number of token ids that models and tokenizers all know; ids from here on are excluded everywhere."""
        tokenizers = [tokenizer for tokenizer in (self.tokenizer, self.teacher_tokenizer) if tokenizer is not None]
        return min([*map(head_rows, self.models.values()), *map(id_count, tokenizers)])

    @cached_property
    def student_head(self) -> Head:
        """What turns the student's last hidden states into logits of the shared vocabulary; proven once, see `Head.of`."""
        return Head.of(self.student, self.vocabulary_size)

    @cached_property
    def teacher_head(self) -> Head | None:
        """As `student_head`, of the teacher; None where there is no teacher."""
        return None if self.teacher is None else Head.of(self.teacher, self.vocabulary_size)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the student's (generation config, config, tokenizer), then the teacher's."""
        found = [*eos_ids_of(self.student, self.tokenizer)]
        if self.teacher is not None:
            found += eos_ids_of(self.teacher, self.teacher_tokenizer)
        return tuple(token_id for token_id in dict.fromkeys(found) if 0 <= token_id < self.vocabulary_size)

    @cached_property
    def pad_id(self) -> int:
        """The id that fills the rest of a row; masks go by length, so it never has a meaning."""
        configs = (self.student.generation_config, self.student.config)
        candidates = [getattr(source, "pad_token_id", None) for source in (self.tokenizer, *configs)]
        usable = (token_id for token_id in (*candidates, *self.eos_ids) if isinstance(token_id, int))
        return next((token_id for token_id in usable if 0 <= token_id < self.vocabulary_size), 0)

    def check_room(self, tokens: int) -> None:
        """Raises UserError where a sequence of `tokens`, prompt and response, exceeds the positions of a model."""
        for role, model in self.models.items():
            limit = position_limit(model)
            if limit is not None and tokens > limit:
                raise UserError(
                    f"prompt and response come to {tokens} tokens, but the {role}, {name_of(model)}, knows {limit} positions; "
                    f"lower max_new_tokens or max_prompt_tokens"
                )


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of positions that a model knows, or None where its configuration names none."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's largest id: its length, unless it leaves ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def name_of(model: PreTrainedModel) -> str:
    """The name that a model was loaded by, or else its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[int]:
    """The end-of-text ids that a model's generation config, its config and its tokenizer name, in that order."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        named = getattr(source, "eos_token_id", None)
        yield from named if isinstance(named, list | tuple) else () if named is None else (named,)


# Where tokenizers of one vocabulary part: digits (also after a line break), blanks, accents and scripts, marks.
PROBES = (
    "The answer is 1234567 (or 3.14159), not 42:\n\n1. one \n2. two",
    "  two  blanks,\ttab\n\n\nlines \r\n end ",
    "naïve café, Ångström, 東京, Привет, مرحبا, 🙂👍🏽",
    "don't SHOUT; x_i += f(a[0], 'b') // comment",
)


def check_tokenizers_agree(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, size: int) -> None:
    """Raise UserError unless both map the same strings to the same ids, as far as the ids below `size` go."""
    remedy = "a divergence compares id with id: choose a student and a teacher of one family"
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    student_tokens = {token_id: token for token, token_id in student_ids.items()}
    teacher_tokens = {token_id: token for token, token_id in teacher_ids.items()}
    for token_id in range(size):
        ours, theirs = student_tokens.get(token_id), teacher_tokens.get(token_id)
        if ours != theirs:
            token = ours or theirs or ""
            raise UserError(
                f"the tokenizers of student and teacher differ: token {token!r} has id {student_ids.get(token)} for "
                f"the student and {teacher_ids.get(token)} for the teacher; {remedy}"
            )
    for text in PROBES:
        ours, theirs = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher))
        if ours != theirs:
            at = len(list(takewhile(lambda ids: ids[0] == ids[1], zip(ours, theirs, strict=False))))
            raise UserError(
                f"the tokenizers of student and teacher have one vocabulary but split text differently: from token "
                f"{at} on {text!r} becomes {student.convert_ids_to_tokens(ours[at : at + 4])} for the student and "
                f"{teacher.convert_ids_to_tokens(theirs[at : at + 4])} for the teacher; {remedy}"
            )


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    drop_layers: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal LM in evaluation mode, from safetensors or from a GGUF file that is unpacked to plain weights.

    `name` takes the forms of `find_source`; `dtype` is a torch floating-point type by name, or "auto"; `drop_layers`
    ("10-19", "0,2,4-6") removes decoder layers, see `remove_layers`; `quantization` "8bit" or "4bit" packs the weights with
    bitsandbytes, for a teacher. Raises UserError where the model cannot be loaded in full.
    """
    source = find_source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        from transformers import GgufConfig

        # Left packed, the model would count as quantised: it could be neither saved nor trained.
        options |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if quantization is not None:
        if source.gguf_file is not None:
            raise UserError(
                f"model {name!r} is a .gguf file, which {quantization} weights cannot be made of; save it to a folder "
                f"(load_model, save_model) and name that"
            )
        options["quantization_config"] = _quantisation(quantization, dtype)
    with _explained("model", name, source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place, dtype=_torch_dtype(dtype), use_safetensors=True, output_loading_info=True, **options
        )
    model, report = loaded
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"model {name!r}: {len(report['missing_keys'])} weights are missing ({some}, ...) and would be random; "
            f"save or download it again"
        )
    if drop_layers:
        remove_layers(model, drop_layers)
    assert isinstance(model, PreTrainedModel)
    # For messages: a name such as world:student, not the place that it leads to.
    model.name_or_path = name
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model name (the forms of `find_source`); raises UserError where there is none."""
    source = find_source(name)
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with _explained("tokenizer", name, source):
        tokenizer = AutoTokenizer.from_pretrained(source.place, trust_remote_code=trust_remote_code, **options)
        if source.gguf_file is not None:
            _mend_gguf_tokenizer(tokenizer, Path(source.place) / source.gguf_file)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_pair(
    student: str,
    teacher: str | None,
    *,
    dtype: str = "float32",
    teacher_dtype: str | None = None,
    teacher_quantization: str | None = None,
    trust_remote_code: bool = False,
    student_drop_layers: str | None = None,
) -> ModelPair:
    """Student, teacher and tokenizer by name, checked to fit; `teacher_dtype` None takes `dtype`.

    Names take the forms of `find_source`. Raises UserError where one cannot be loaded or the tokenizers differ; the
    tokenizers are compared before any weight is read.
    """
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
    teacher_tokenizer = None if teacher is None else load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    if teacher_tokenizer is not None:
        check_tokenizers_agree(tokenizer, teacher_tokenizer, min(id_count(tokenizer), id_count(teacher_tokenizer)))
    student_model = load_model(
        student, dtype=dtype, trust_remote_code=trust_remote_code, drop_layers=student_drop_layers
    )
    teacher_model = None
    if teacher is not None:
        teacher_model = load_model(
            teacher,
            dtype=teacher_dtype or dtype,
            trust_remote_code=trust_remote_code,
            quantization=teacher_quantization,
        )
    return ModelPair(student_model, teacher_model, tokenizer, teacher_tokenizer)


@contextmanager
def _explained(what: str, name: str, source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if source.on_hub and isinstance(error, OSError) and not Path(name).exists():
            reason = "it is neither a local folder nor reachable on the hub; check the name and the connection"
        else:
            # transformers adds advice and long lists over many lines; the cause comes first.
            reason = shorten(str(error), 500, placeholder=" ...") or type(error).__name__
        raise UserError(f"the {what} of {name!r} cannot be loaded: {reason}") from error


def _quantisation(name: str, dtype: str) -> BitsAndBytesConfig:
    if name not in ("8bit", "4bit"):
        raise UserError(f"quantization is {name!r}; choose 8bit or 4bit")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{name} weights need bitsandbytes, which is not installed: pip install 'switchkd[quant]'")
    # It would warn of its cast to float16 at every layer of every forward.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        # Above a threshold it takes a column out of int8 for all rows: what is said of one text would depend on the others.
        llm_int8_threshold=0.0,
        # Nearer to the plain weights than its default, fp4, at the same size.
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=None if dtype == "auto" else _torch_dtype(dtype),
    )


def _torch_dtype(name: str) -> torch.dtype | str:
    dtype = name if name == "auto" else getattr(torch, name, None)
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise UserError(f"dtype {name!r} is not known; choose float32, bfloat16, float16, float64 or auto")


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _mend_gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Put back what transformers leaves out of a tokenizer that it reads from a GGUF file."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    # SmolLM splits off every digit before its byte-level step; GGUF names that rule but does not hold it.
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if tokenizer.chat_template is None and {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        tokenizer.chat_template = CHATML


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Save model and tokenizer as safetensors so that `folder` holds the old model or the new one, never a part.

    An adapted (PEFT) model saves its adapter. Files of `folder` that belong to no model are kept. Raises UserError
    where `folder` is a file.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save a model to {str(folder)!r}: it is a file; name a folder")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    _finish_swap(old, folder)  # of a save that was killed half-way
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _finish_swap(old, folder)


# What an earlier save may leave that a later one does not write, and that would be read with it.
STALE = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "chat_template.jinja")


def _finish_swap(old: Path, folder: Path) -> None:
    if not folder.exists() and old.exists():
        old.rename(folder)
    if not old.exists():
        return
    for entry in old.iterdir():
        if not (folder / entry.name).exists() and not any(entry.match(pattern) for pattern in STALE):
            entry.rename(folder / entry.name)
    shutil.rmtree(old)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters; a tied weight counts once, and a packed one as the numbers that it stands for."""
    return sum(map(_numbers_in, model.parameters()))


def _numbers_in(parameter: nn.Parameter) -> int:
    # bitsandbytes keeps two 4-bit numbers in a byte, and apart from them the shape that they had.
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)
