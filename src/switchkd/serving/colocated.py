"""vLLM in this process: started on two folders, asked in plain Python. The server and the trainer both hold one.

vLLM itself is imported when one is started: it is an extra, and most of the package runs without it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from switchkd.distributions.noise import row_keys
from switchkd.errors import UserError
from switchkd.records import Prompt
from switchkd.serving.call import Call
from switchkd.serving.heads import Padding, padded_copy, padding_of
from switchkd.serving.started import Started, check_lengths

# A lost draft is asked for again, and gives the same tokens; a cache that is too small loses it every time.
_ATTEMPTS = 3
# The draft model's tokens beyond the last one that is kept, and the one that vLLM wants room for.
_BEYOND = 2


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started; no setting changes a token.

    `block_size` tokens are drafted before the teacher is asked, `max_rows` rollouts are in flight, `max_tokens` is the longest
    prompt and response together, `cache_gib` the memory of both models' caches, and `more` are settings of vLLM's own. Raises
    UserError for numbers out of range.
    """

    block_size: int = 4
    max_rows: int = 64
    max_tokens: int = 1024
    dtype: str = "float32"
    cache_gib: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("block_size", "max_rows", "max_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}; it has to be at least 1")
        if not self.cache_gib > 0:
            raise UserError(f"cache_gib is {self.cache_gib}; it has to be above 0")

    def check_room(self, longest: int, shortest_prompt: int) -> None:
        """As `VllmEngine.check_room`, before vLLM is started."""
        check_lengths(self.max_tokens, longest, shortest_prompt)


def check_prompts(prompts: Sequence[Prompt], call: Call, options: VllmOptions) -> None:
    """Raise UserError for prompts that vLLM cannot continue as every engine does."""
    for place, prompt in enumerate(prompts):
        if any(not 0 <= token_id < call.vocabulary_size for token_id in prompt.token_ids):
            raise UserError(f"prompt {place} holds an id outside the vocabulary of {call.vocabulary_size} ids")
        if not 0 <= prompt.begun < call.sampling.max_new_tokens:
            raise UserError(f"prompt {place} has {prompt.begun} tokens of a response already; leave something to write")
        tokens = len(prompt.token_ids) - prompt.begun + call.sampling.max_new_tokens
        check_lengths(options.max_tokens, tokens, len(prompt.token_ids), f"prompt {place}")


class ColocatedVllm:
    """A teacher with its student as draft model, in vLLM, in this process. Both are names or folders of safetensors.

    `version` numbers the student's weights: 0 are those that it was started with.
    """

    def __init__(self, teacher: str, student: str, options: VllmOptions = VllmOptions()) -> None:
        self.options = options
        self.version = 0
        self._folder = Path(tempfile.mkdtemp(prefix="switchkd-heads-"))
        # Gone with this object.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # Of the student's weights, now and whenever new ones come.
        self._padding: Padding | None = None
        self.llm = _started(self._filled_up("teacher", teacher), self._filled_up("student", student), options)
        self.llm.collective_rpc("switchkd_begin")
        self.vocabulary_size = int(self.llm.model_config.get_vocab_size())
        models = self.llm.collective_rpc("switchkd_sizes")[0]
        self.started = Started(options.max_tokens, self.vocabulary_size, models)
        self._names = 0

    def _filled_up(self, role: str, place: str) -> str:
        """The place of the model as vLLM's kernels here take it."""
        if find_spec("vllm") is None:
            raise UserError("vLLM is not installed here; see docs/vllm.md, or name a server by its url")
        from vllm.platforms import current_platform

        padding = padding_of(Path(place)) if current_platform.is_cpu() else None
        if padding is None:
            return place
        self._padding = padding if role == "student" else self._padding
        return str(padded_copy(Path(place), padding, self._folder / role))

    def rollouts(
        self, prompts: Sequence[Prompt], call: Call, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """What `rollouts_of` turns into the rollouts of these prompts, in their order. Raises UserError where there are none."""
        if call.vocabulary_size > self.vocabulary_size:
            raise UserError(
                f"vocabulary_size is {call.vocabulary_size}, but the models here have {self.vocabulary_size} ids"
            )
        check_prompts(prompts, call, self.options)
        keys, text = row_keys(seed, prompts).tolist(), call.to_json()
        self._names += 1
        names = [f"{self._names}.{place}" for place in range(len(prompts))]
        asked = {
            name: {
                "name": name,
                "key": key,
                "call": text,
                "last_id": prompt.token_ids[-1],
                "prompt_id": prompt.prompt_id,
            }
            | {"sample_id": prompt.sample_id, "begun": prompt.begun}
            for name, key, prompt in zip(names, keys, prompts, strict=True)
        }
        by_name = dict(zip(names, prompts, strict=True))
        parts: dict[str, dict[str, Tensor]] = {}
        lost: dict[str, str] = {}
        try:
            for _ in range(_ATTEMPTS):
                left = [name for name in names if name not in parts]
                if not left:
                    break
                self._generate([(by_name[name], asked[name]) for name in left], call)
                for name in left:
                    # One at a time, so that those of a later attempt can stand between those of the first.
                    answer, missing, fault = self.llm.collective_rpc("switchkd_take", args=([name],))[0]
                    if fault:
                        raise UserError(
                            f"{fault[name]}: the weights have diverged, or dtype {self.options.dtype} is too low"
                        )
                    lost = missing or lost
                    parts |= {} if missing else {name: answer}
                if on_progress:
                    on_progress(len(parts))
        finally:
            self.llm.collective_rpc("switchkd_forget")
        if len(parts) < len(names):
            raise UserError(f"vLLM lost drafts {_ATTEMPTS} times ({next(iter(lost.values()))}); give it more cache_gib")
        return joined([parts[name] for name in names])

    def _generate(self, asked: Sequence[tuple[Prompt, Mapping[str, Any]]], call: Call) -> None:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                # One more: the last token of the prompt is written first.
                max_tokens=call.sampling.max_new_tokens - prompt.begun + 1,
                temperature=1.0,
                ignore_eos=True,
                stop_token_ids=[each for each in call.eos_ids if each != prompt.token_ids[-1]],
                detokenize=False,
                extra_args={"switchkd": dict(arguments)},
            )
            for prompt, arguments in asked
        ]
        texts = [{"prompt_token_ids": list(prompt.token_ids[:-1])} for prompt, _ in asked]
        self.llm.generate(texts, sampling, use_tqdm=False)

    def load(self, path: Path) -> int:
        """Give the draft model the weights of a safetensors file; what its cache holds of the older ones is dropped.

        Returns their version, which every answer carries from then on.
        """
        self.version += 1
        if self._padding is not None:
            filled_up = self._folder / "weights.safetensors"
            save_file(self._padding.weights(load_file(path)), filled_up)
            path = filled_up
        self.llm.collective_rpc("switchkd_load", args=(str(path), self.version))
        if not self.llm.reset_prefix_cache():
            raise UserError("vLLM could not drop its cache after new weights; no rollout may be running meanwhile")
        return self.version


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One answer of several."""
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _started(teacher: str, student: str, options: VllmOptions) -> Any:
    # In this process, so that answers are handed over and not sent; and the runner whose parts our rule replaces.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from vllm import LLM

    speculative = {
        "method": "draft_model",
        "model": student,
        "num_speculative_tokens": options.block_size,
        "draft_sample_method": "probabilistic",
    }
    length = options.max_tokens + options.block_size + _BEYOND
    settings: dict[str, Any] = {
        "model": teacher,
        "speculative_config": speculative,
        "worker_extension_cls": "switchkd.serving.worker.SwitchWorker",
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": length,
        "max_num_seqs": options.max_rows,
        "kv_cache_memory_bytes": int(options.cache_gib * 2**30),
        "enforce_eager": True,
        "async_scheduling": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    try:
        return LLM(**{**settings, **options.more})
    # What vLLM raises for a model, a machine or a setting that it cannot serve. Anything else is a fault, and keeps its traceback.
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        reason = shorten(str(error), 500, placeholder=" ...") or type(error).__name__
        raise UserError(
            f"vLLM does not start with the teacher {teacher} and the student {student}: {reason}"
        ) from error
