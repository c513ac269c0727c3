"""Models and tokenizers by name: plain, quantized, or unpacked from a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Unpack, cast

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
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from switchkd.errors import UserError
from switchkd.models.hub import UNREACHABLE, offline_at_once
from switchkd.models.layers import remove_layers
from switchkd.models.pair import ModelPair, check_tokenizers_agree, id_count
from switchkd.models.placement import Placement, PlacementSettings, WeightDtype, init_options, placement_of, torch_dtype
from switchkd.models.sources import Source, find_source

_CPU_PACKING = "support_avx512bf16_for_cpu"


def load_pair(
    student: str,
    teacher: str | None,
    *,
    placement: Placement | None = None,
    student_quantization: str | None = None,
    teacher_quantization: str | None = None,
    trust_remote_code: bool = False,
    student_drop_layers: str | None = None,
    **settings: Unpack[PlacementSettings],
) -> ModelPair:
    """Student, teacher and tokenizer by name (see `find_source`), checked to fit, each loaded onto its device.

    Device and precision are those of `placement`, or else what `settings` ask for (see `placement_of`): device="cuda",
    dtype="bfloat16", ... `model_init_kwargs` and `teacher_model_init_kwargs` go on to `from_pretrained` and win over both.
    Raises UserError if one cannot be loaded or the tokenizers differ.
    """
    place = placement_of(**settings) if placement is None else placement
    student_kwargs = place.init_kwargs(settings.pop("model_init_kwargs", None))
    teacher_kwargs = place.init_kwargs(settings.pop("teacher_model_init_kwargs", None))
    if placement is not None and settings:
        raise UserError(f"{next(iter(settings))} is given beside a placement, which has decided it; give one of them")
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code, revision=revision_in(student_kwargs))
    teacher_model = teacher_tokenizer = None
    if teacher is not None:
        # Before any weight is read: these may take minutes, and the wrong teacher shows at once.
        teacher_tokenizer = load_tokenizer(
            teacher, trust_remote_code=trust_remote_code, revision=revision_in(teacher_kwargs)
        )
        check_tokenizers_agree(tokenizer, teacher_tokenizer, min(id_count(tokenizer), id_count(teacher_tokenizer)))
    student_model = load_model(
        student,
        trust_remote_code=trust_remote_code,
        dtype=place.student_dtype,
        device=place.device,
        init_kwargs=student_kwargs,
        drop_layers=student_drop_layers,
        quantization=student_quantization,
    )
    if teacher is not None:
        teacher_model = load_model(
            teacher,
            trust_remote_code=trust_remote_code,
            dtype=place.teacher_dtype,
            device=place.device,
            init_kwargs=teacher_kwargs,
            quantization=teacher_quantization,
        )
    tokenizers = tokenizer, teacher_tokenizer
    return ModelPair(student_model, teacher_model, *tokenizers, place.autocast_dtype, tokenizers_agree=True)


class LoadedTeacher(NamedTuple):
    """A teacher with the tokenizer that belongs to it, None where that is not known."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load_teachers(
    names: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, LoadedTeacher]:
    """Teachers by name, where `names` says what each is loaded from (see `find_source`); `options` go on to `load_model`.

    What stands under two names is loaded once. Raises UserError, before any weight is read, where a teacher's tokenizer differs
    from `tokenizer`, the student's.
    """
    revision = revision_in(options.get("init_kwargs"))
    tokenizers = load_tokenizers(names, tokenizer, trust_remote_code=trust_remote_code, revision=revision)
    models = {
        source: load_model(source, trust_remote_code=trust_remote_code, **options)
        for source in dict.fromkeys(names.values())
    }
    return {name: LoadedTeacher(models[source], tokenizers[name]) for name, source in names.items()}


def load_tokenizers(
    names: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of teachers by name, all of one revision where it is given.

    Raises UserError, naming the teacher, where one differs from the student's.
    """
    found = {}
    for name, source in names.items():
        found[name] = theirs = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
        if tokenizer is not None:
            try:
                check_tokenizers_agree(tokenizer, theirs, min(id_count(tokenizer), id_count(theirs)))
            except UserError as error:
                raise UserError(f"teacher {name} ({source}): {error}") from None
    return found


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    drop_layers: str | None = None,
    quantization: str | None = None,
    device: torch.device | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal LM in evaluation mode, from safetensors or from a GGUF file that is unpacked to plain weights.

    `name` is explained at `find_source`; `dtype` is a torch floating-point type, or "auto"; `drop_layers` ("10-19",
    "0,2,4-6") removes decoder layers; `quantization` "8bit" or "4bit" packs the weights with bitsandbytes. `device`
    None is the CPU. `init_kwargs` go on to `from_pretrained`; a `device_map` among them is kept in place of `device`. Raises
    UserError if the model cannot be loaded in full.
    """
    source = find_source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": torch_dtype(dtype)}
    # Whatever the keywords say: pickled weights, the other format, could run code.
    options |= {**init_options(init_kwargs), "use_safetensors": True}
    if source.gguf_file is not None:
        options |= {"gguf_file": source.gguf_file, **_unpacking()}
    if quantization is not None:
        if source.gguf_file is not None:
            raise UserError(
                f"model {name!r} is a .gguf file, and {quantization} weights need safetensors; save it to a folder "
                f"(load_model, then save_pretrained) and name that"
            )
        if "quantization_config" in options:
            raise UserError(
                f"the quantization of {name!r} is {quantization!r}, but its model_init_kwargs bring a quantization_config; set one"
            )
        options["quantization_config"] = _quantization(quantization, options["dtype"])
    on_accelerator = device is not None and device.type != "cpu" and "device_map" not in options
    # Else transformers takes a model apart while it loads it under ZeRO-3, whatever zero3_init_flag says, and the teacher too.
    unset_hf_deepspeed_config()
    if on_accelerator and source.gguf_file is None:
        # Onto the device, weight by weight: a machine with eight GPUs has no room for eight teachers in its own memory.
        options["device_map"] = {"": device}
    model = _in_full(name, source, options)
    if drop_layers:
        remove_layers(model, drop_layers)
    if on_accelerator and "device_map" not in options:
        cast(nn.Module, model).to(device)
    # For messages: a name such as world:student says more than the folder it leads to.
    model.name_or_path = name
    return model


def _unpacking() -> dict[str, Any]:
    """What has transformers unpack a GGUF file's weights. Left packed, a model counts as quantized: neither saved nor trained."""
    try:
        from transformers import GgufConfig
    except ImportError:
        # An older release always unpacks them, and does not know the setting.
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _in_full(name: str, source: Source, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model that transformers loads; raises UserError if any weight is missing."""
    with _explained("model", name, source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.place, output_loading_info=True, **options)
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"model {name!r}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and would be random; save or "
            f"download it again"
        )
    model: PreTrainedModel = loaded[0]
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for a product in bfloat16 without a gradient.
        if hasattr(module, _CPU_PACKING):
            setattr(module, _CPU_PACKING, False)
    return model


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model name (see `find_source`). Raises UserError if it cannot be loaded."""
    source = find_source(name)
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    options |= {} if revision is None else {"revision": revision}
    with _explained("tokenizer", name, source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, trust_remote_code=trust_remote_code, **options
        )
        if source.gguf_file is not None:
            _mend_gguf_tokenizer(tokenizer, Path(source.place) / source.gguf_file)
    return tokenizer


def revision_in(init_kwargs: Mapping[str, Any] | None) -> str | None:
    """The revision that the keywords of `from_pretrained` pin a model to: its tokenizer has to be of the same."""
    return (init_kwargs or {}).get("revision")


@contextmanager
def _explained(what: str, name: str, source: Source) -> Iterator[None]:
    offline = source.on_hub and offline_at_once()
    try:
        yield
    except UserError:
        # One of ours says what to do already; as a ValueError it would be caught below.
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        if offline and isinstance(error, OSError):
            reason = f"there is no such local folder, {UNREACHABLE}; check the name and the connection"
        elif source.on_hub and isinstance(error, OSError) and not Path(name).exists():
            cause = shorten(str(error), 200, placeholder=" ...")
            reason = (
                f"it is neither a local folder nor could it be read from the hub ({cause}); check the name and the connection, "
                f"and sign in with `hf auth login` where a model is gated"
            )
        else:
            # transformers adds many lines of advice; the cause comes first.
            reason = shorten(str(error), 500, placeholder=" ...") or type(error).__name__
        raise UserError(f"the {what} of {name!r} cannot be loaded: {reason}") from error


def _quantization(name: str, dtype: WeightDtype) -> BitsAndBytesConfig:
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


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _mend_gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Put back what transformers drops when it reads a tokenizer from a GGUF file."""
    from tokenizers import pre_tokenizers

    # SmolLM splits off every digit before its byte-level step; GGUF names that rule but does not hold it.
    if _gguf_splitting(file) == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if tokenizer.chat_template is None and {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        tokenizer.chat_template = CHATML


def _gguf_splitting(file: Path) -> str | None:
    """The name of a GGUF file's pre-tokenizer, or None where the file names none."""
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:
        from gguf import GGUFReader

        found = GGUFReader(file).get_field("tokenizer.ggml.pre")
        return None if found is None else str(found.contents())
    rule: str | None = read_gguf_metadata(str(file))[0].get("tokenizer.ggml.pre")
    return rule
