"""`VllmEngine`: rollouts by vLLM, in this process or on a server, by the call of every engine."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from switchkd.errors import UserError, did_you_mean
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling
from switchkd.rollout.checks import checked_prompts
from switchkd.rollout.engine import KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.serving.call import Backend, Call, rollouts_of
from switchkd.serving.colocated import ColocatedVllm, VllmOptions
from switchkd.serving.remote import RemoteVllm
from switchkd.serving.started import check_lengths
from switchkd.settings.typed import typed

# The word for vLLM in the trainer's own process.
HERE = "here"


class VllmEngine:
    """Rolls out by vLLM: the teacher is its target model, the student its draft model, and the policy decides what stands.

    The tokens are those of `ReferenceEngine`, as far as vLLM's kernels round like transformers' (in float32 on a CPU they do;
    docs/vllm.md). `url` is the address of a `switchkd serve`; without one vLLM is started in this process, with `options`,
    and reads the teacher from `teacher`, a folder or name, or from a copy that is saved for it. `backend` takes the place of both.
    Before a call the student's weights are sent, if they have changed since the last one.
    Raises UserError for a pair without a teacher, for an adapter, and for a server with other models.
    """

    def __init__(
        self,
        pair: ModelPair,
        url: str | None = None,
        *,
        options: VllmOptions = VllmOptions(),
        teacher: str | None = None,
        margin_top_k: int = 0,
        backend: Backend | None = None,
    ) -> None:
        if pair.teacher is None:
            raise UserError("vLLM writes with a teacher and a student, but the pair has no teacher; load one")
        if hasattr(pair.student, "peft_config"):
            raise UserError(
                "the student is an adapter, and vLLM's draft model takes whole weights alone; merge it first"
            )
        self.pair = pair
        self.margin_top_k = margin_top_k
        self._folder = Path(tempfile.mkdtemp(prefix="switchkd-vllm-"))
        # Gone with the engine.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._sent: object = None
        self._version = -1
        remote = RemoteVllm(url) if url and backend is None else None
        self.backend: Backend = backend or remote or self._colocated(teacher, options)
        if self.backend.started is not None:
            self.backend.started.check_models(pair)

    def _colocated(self, teacher: str | None, options: VllmOptions) -> Backend:
        folder = self._folder
        for role, model in self.pair.models.items():
            if role == "student" or teacher is None:
                model.save_pretrained(folder / role)
        return ColocatedVllm(teacher or str(folder / "teacher"), str(folder / "student"), options)

    def check_room(self, longest: int, shortest_prompt: int) -> None:
        """Raise UserError where vLLM has no room for a prompt and its response of `longest` tokens, or a prompt is too short."""
        if self.backend.started is not None:
            check_lengths(self.backend.started.max_tokens, longest, shortest_prompt)

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in their order; see `Engine.generate`. A prompt has at least two tokens."""
        records = checked_prompts(self.pair, prompts, policy, sampling, keep_teacher)
        if keep_teacher == "hidden":
            raise UserError("vLLM hands over no hidden states of the teacher; set teacher_signal: {top_k: 64}")
        if sampling.no_repeat_ngram_size:
            raise UserError("no_repeat_ngram_size is not for rollouts by vLLM; set it to 0")
        if not records:
            return []
        call = Call(
            policy,
            sampling,
            self.pair.vocabulary_size,
            self.pair.eos_ids,
            asks_teacher=bool(keep_teacher),
            top_k=keep_teacher or 0,
            margin_top_k=self.margin_top_k,
        )
        self._send_weights()
        return rollouts_of(self.backend.rollouts(records, call, seed, on_progress), records, call, self._version)

    def _send_weights(self) -> None:
        state = [(name, *_bit_sums(each)) for name, each in self.pair.student.named_parameters()]
        if state == self._sent:
            return
        path = self._folder / "weights.safetensors"
        # Tied weights are one tensor, and the format holds no two names of one.
        save_file({name: each.detach().cpu().contiguous() for name, each in self.pair.student.named_parameters()}, path)
        self._version = self.backend.load(path)
        self._sent = state
        path.unlink()


def _bit_sums(weight: Tensor) -> tuple[int, int]:
    """Two sums over a tensor's bits, read as whole numbers of its own width and of half of it: an update changes one of them."""
    # Not torch's count of changes: a fused optimizer does not raise it. Nor a sum of floats, which rounds small changes away.
    views = {
        1: (torch.uint8, torch.int8),
        2: (torch.int16, torch.int8),
        4: (torch.int32, torch.int16),
        8: (torch.int64, torch.int32),
    }
    flat = weight.detach().contiguous().flatten()
    first, second = (int(flat.view(dtype).sum(dtype=torch.int64)) for dtype in views[weight.element_size()])
    return first, second


def vllm_settings(given: str | Mapping[str, Any]) -> tuple[str | None, str | None, VllmOptions]:
    """The server's address (None: in this process), the teacher's place for vLLM and its options, from a run's `vllm`.

    Raises UserError for an unknown setting, or one of another type.
    """
    settings = dict(given) if isinstance(given, Mapping) else {} if given == HERE else {"url": given}
    hints = {**get_type_hints(VllmOptions), "url": str, "teacher": str}
    for key in settings:
        if key not in hints:
            raise UserError(f"vllm has no setting {key!r}{did_you_mean(key, hints)}")
    values = {key: typed(f"vllm.{key}", value, hints[key]) for key, value in settings.items()}
    url, teacher = values.pop("url", None), values.pop("teacher", None)
    if url is not None and (values or teacher):
        raise UserError(
            f"vllm.{next(iter(values), 'teacher')} is set, but the server at {url} has been started; set it there"
        )
    return url, teacher, VllmOptions(**values)


def vllm_engine(pair: ModelPair, given: str | Mapping[str, Any], *, margin_top_k: int = 0) -> VllmEngine:
    """The engine that a run's `vllm` asks for."""
    url, teacher, options = vllm_settings(given)
    return VllmEngine(pair, url, options=options, teacher=teacher, margin_top_k=margin_top_k)
