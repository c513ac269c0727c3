"""Models by name, the pair of student and teacher, and what a model's head computes.

Shape letters: V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from switchkd.errors import UserError

# ---------------------------------------------------------------------------------------------------------- the pair


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
        for role, model in self._models.items():
            if self.tokenizer.vocab_size > head_rows(model):
                raise UserError(
                    f"the tokenizer knows {self.tokenizer.vocab_size} tokens but the {role} ({name_of(model)}) scores only "
                    f"{head_rows(model)}: they do not belong together; take a {role} of the tokenizer's family"
                )
        eos_id = self.tokenizer.eos_token_id
        if isinstance(eos_id, int) and eos_id >= self.vocabulary_size:
            raise UserError(
                f"the end-of-text token {self.tokenizer.eos_token!r} has id {eos_id}, but only ids below "
                f"{self.vocabulary_size} are known to both models, so no text could ever end; set the tokenizer's "
                f"eos_token to a token that both know"
            )

    @property
    def _models(self) -> dict[str, PreTrainedModel]:
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    @cached_property
    def vocabulary_size(self) -> int:
        """The number of token ids that both models and the tokenizers know; ids from here on are excluded everywhere."""
        tokenizers = [tokenizer for tokenizer in (self.tokenizer, self.teacher_tokenizer) if tokenizer is not None]
        return min(*map(head_rows, self._models.values()), *map(id_count, tokenizers), head_rows(self.student))

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


def head_rows(model: PreTrainedModel) -> int:
    """The number of token ids that a model scores, padding rows included."""
    return int(_base_of(model).get_output_embeddings().out_features)


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


PROBES = (
    "The answer is 1234567 (or 3.14159), not 42.",
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
            token = theirs if ours is None else ours
            raise UserError(
                f"the tokenizers of student and teacher differ: token {token!r} has id {student_ids.get(token)} for the "
                f"student and {teacher_ids.get(token)} for the teacher; {remedy}"
            )
    for text in PROBES:
        ours, theirs = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher))
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            raise UserError(
                f"the tokenizers of student and teacher have one vocabulary but split text differently: {text!r} becomes "
                f"{student.convert_ids_to_tokens(ours[at : at + 4])} against "
                f"{teacher.convert_ids_to_tokens(theirs[at : at + 4])} from token {at} on; {remedy}"
            )


# --------------------------------------------------------------------------------------------------- loading by name


@dataclass(frozen=True)
class Source:
    """Where a model name leads: what `from_pretrained` is given."""

    place: str
    gguf_file: str | None = None
    on_hub: bool = False


def find_source(name: str) -> Source:
    """Where a model name leads, by its form; whether a hub id exists shows only when it is loaded.

    `name` is a hub id, a local folder, the path of a .gguf file, "package:NAME" (the first .gguf file inside an installed
    Python package, which is not imported), or "world:teacher" / "world:student" (the pair that comes with switchkd).
    Raises UserError where a file, folder or package is missing, or a folder holds no model.
    """
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return _gguf_source(_gguf_inside_package(rest))
    if kind == "world":
        return _folder_source(Path(str(files("switchkd"))) / "assets" / "world" / rest, name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        return _folder_source(path, name)
    if path.exists():
        raise UserError(f"model {name!r} is a file; give the folder that holds its config.json, or a .gguf file")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != name.strip("/").count("/") or name.count("/") > 1:
        raise UserError(f"model {name!r}: there is no such folder; check the path")
    return Source(name, on_hub=True)


def _folder_source(folder: Path, name: str) -> Source:
    # An adapter's folder has no config.json: transformers then loads the model that the adapter names, and adapts it.
    if not any((folder / marker).is_file() for marker in ("config.json", "adapter_config.json")):
        state = "holds no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"model {name!r}: the folder {folder} {state}; give a folder written by save_pretrained")
    return Source(str(folder))


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"model {str(path)!r}: there is no such file; check the path")
    return Source(str(path.parent), gguf_file=path.name)


def _gguf_inside_package(package: str) -> Path:
    # find_spec imports the parents of a dotted name, and a package may do anything on import.
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(f"model 'package:{package}': no Python package {package!r} is installed; install it, or check the name")
    found = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if not found:
        raise UserError(f"model 'package:{package}': the package {package!r} holds no .gguf file; name another package")
    return found[0]


def load_model(
    name: str, *, dtype: str = "float32", trust_remote_code: bool = False, drop_layers: str | None = None
) -> PreTrainedModel:
    """A causal LM in evaluation mode, from safetensors or from a GGUF file that is unpacked to plain weights.

    `name` takes the forms of `find_source`; `dtype` is a torch floating-point type by name, or "auto"; `drop_layers` ("10-19",
    "0,2,4-6") removes decoder layers, see `remove_layers`. Raises UserError where the model cannot be loaded in full.
    """
    source = find_source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        from transformers import GgufConfig

        # Left packed, the model would count as quantised: it could be neither saved nor trained.
        options |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    with _explained("model", name, source):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.place, dtype=_torch_dtype(dtype), use_safetensors=True, output_loading_info=True, **options
        )
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"model {name!r}: {len(report['missing_keys'])} weights are missing ({some}, ...) and would be random; "
            f"save or download it again"
        )
    if drop_layers:
        remove_layers(model, drop_layers)
    assert isinstance(model, PreTrainedModel)
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
        teacher_model = load_model(teacher, dtype=teacher_dtype or dtype, trust_remote_code=trust_remote_code)
    return ModelPair(student_model, teacher_model, tokenizer, teacher_tokenizer)
