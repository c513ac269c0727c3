"""Models and tokenizers by name: plain, quantized, or unpacked from a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from switchkd.errors import UserError
from switchkd.models.layers import remove_layers
from switchkd.models.pair import ModelPair, check_tokenizers_agree, id_count
from switchkd.models.sources import Source, find_source


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
    """Student, teacher and tokenizer by name (see `find_source`), checked to fit; `teacher_dtype` None takes `dtype`.

    Raises UserError if one cannot be loaded or the tokenizers differ.
    """
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
    teacher_model = teacher_tokenizer = None
    if teacher is not None:
        # Before any weight is read: these may take minutes, and the wrong teacher shows at once.
        teacher_tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
        check_tokenizers_agree(tokenizer, teacher_tokenizer, min(id_count(tokenizer), id_count(teacher_tokenizer)))
    student_model = load_model(
        student, dtype=dtype, trust_remote_code=trust_remote_code, drop_layers=student_drop_layers
    )
    if teacher is not None:
        teacher_model = load_model(
            teacher,
            dtype=teacher_dtype or dtype,
            trust_remote_code=trust_remote_code,
            quantization=teacher_quantization,
        )
    return ModelPair(student_model, teacher_model, tokenizer, teacher_tokenizer, tokenizers_agree=True)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    drop_layers: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal LM in evaluation mode, from safetensors or from a GGUF file that is unpacked to plain weights.

    `name` is explained at `find_source`; `dtype` is a torch floating-point type by name, or "auto"; `drop_layers` ("10-19",
    "0,2,4-6") removes decoder layers; `quantization` "8bit" or "4bit" packs a teacher's weights with bitsandbytes. Raises
    UserError if the model cannot be loaded in full.
    """
    source = find_source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": _torch_dtype(dtype)}
    if source.gguf_file is not None:
        from transformers import GgufConfig

        # Left packed, the model would count as quantized: it could be neither saved nor trained.
        options |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if quantization is not None:
        if source.gguf_file is not None:
            raise UserError(
                f"model {name!r} is a .gguf file, and {quantization} weights need safetensors; save it to a folder "
                f"(load_model, then save_pretrained) and name that"
            )
        options["quantization_config"] = _quantization(quantization, options["dtype"])
    with _explained("model", name, source):
        # Pickled weights, the other format, could run code.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place, use_safetensors=True, output_loading_info=True, **options
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"model {name!r}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and would be random; save or "
            f"download it again"
        )
    if drop_layers:
        remove_layers(model, drop_layers)
    # For messages: a name such as world:student says more than the folder it leads to.
    model.name_or_path = name
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model name (see `find_source`). Raises UserError if it cannot be loaded."""
    source = find_source(name)
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with _explained("tokenizer", name, source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, trust_remote_code=trust_remote_code, **options
        )
        if source.gguf_file is not None:
            _mend_gguf_tokenizer(tokenizer, Path(source.place) / source.gguf_file)
    return tokenizer


@contextmanager
def _explained(what: str, name: str, source: Source) -> Iterator[None]:
    try:
        yield
    except UserError:
        # One of ours says what to do already; as a ValueError it would be caught below.
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if source.on_hub and isinstance(error, OSError) and not Path(name).exists():
            reason = "it is neither a local folder nor reachable on the hub; check the name and the connection"
        else:
            # transformers adds many lines of advice; the cause comes first.
            reason = shorten(str(error), 500, placeholder=" ...") or type(error).__name__
        raise UserError(f"the {what} of {name!r} cannot be loaded: {reason}") from error


def _quantization(name: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if name not in ("8bit", "4bit"):
        raise UserError(f"quantization is {name!r}; choose 8bit or 4bit")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{name} weights need bitsandbytes, which is not installed: pip install 'switchkd[quant]'")
    # Its cast to float16 draws a warning from every layer of every forward.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        # A threshold takes a column out of int8 for all rows, so that a text's scores would depend on the other texts.
        llm_int8_threshold=0.0,
        # Closer to the plain weights than the default, fp4, at the same size.
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=None if dtype == "auto" else dtype,
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
    """Put back what transformers drops when it reads a tokenizer from a GGUF file."""
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
