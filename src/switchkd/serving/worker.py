"""vLLM's side: our acceptance rule in place of its rejection sampler, our draws in its draft model, new weights for the student.

vLLM takes `SwitchWorker` by its own setting, `worker_extension_cls`, and mixes it into the worker; its methods are called by name.
Nothing of vLLM is changed but the objects of this one worker. Written for, and run with, vLLM 0.32 and its first model runner.

Shape letters: B requests of a step, N drafted positions of all of them, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler

from switchkd.errors import UserError
from switchkd.records import Prompt
from switchkd.serving.acceptance import NO_TOKEN, Request, accept, propose
from switchkd.serving.call import answer_of, call_of
from switchkd.serving.started import sizes_of

# The key of a request's extra_args that holds what it asks of us.
ARGUMENTS = "switchkd"


class SwitchWorker:
    """What is mixed into vLLM's worker. `switchkd_begin` has to be called once, before the first request."""

    model_runner: Any
    vllm_config: Any

    def switchkd_begin(self) -> None:
        """Put our rule in the place of the rejection sampler. Raises UserError for an engine that is not set up for it."""
        speculative = self.vllm_config.speculative_config
        if speculative is None or speculative.method != "draft_model":
            raise UserError("the server has no draft model; set speculative_config with method draft_model")
        if self.vllm_config.scheduler_config.async_scheduling:
            raise UserError("the server schedules ahead of the tokens; set async_scheduling to false")
        self.switchkd = Rule(self.model_runner)

    def switchkd_sizes(self) -> dict[str, dict[str, int]]:
        """The sizes of both models by role; see `sizes_of`."""
        student = self.vllm_config.speculative_config.draft_model_config
        models = {"teacher": self.vllm_config.model_config, "student": student}
        return {role: sizes_of(model.hf_config) for role, model in models.items()}

    def switchkd_take(self, names: list[str]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
        """Hand over finished rollouts: the answer for those of `names` that are whole, and why the others are lost or faulty."""
        requests = {name: self.switchkd.requests.pop(name) for name in names}
        whole = [each for each in requests.values() if not each.lost and not each.fault]
        lost = {name: each.lost for name, each in requests.items() if each.lost}
        fault = {name: each.fault for name, each in requests.items() if each.fault}
        return answer_of([each.log for each in whole], [each.version for each in whole]), lost, fault

    def switchkd_forget(self) -> None:
        """Drop all rollouts: those of a call that was broken off."""
        self.switchkd.requests.clear()

    def switchkd_load(self, path: str, version: int) -> None:
        """Give the draft model the weights of a safetensors file, which from then on are `version`.

        Raises UserError where one is missing; then no answer is given until weights have been loaded in full.
        """
        self.switchkd.version = NO_TOKEN
        student = self.model_runner.drafter.model
        config = self.vllm_config.speculative_config.draft_model_config
        names = {name for name, _ in student.named_parameters()}
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(student)
            loaded = student.load_weights(load_file(path).items())
            finalize_layerwise_reload(student, config)
        if missing := sorted(names - {*(loaded or names)}):
            raise UserError(f"{len(missing)} of the student's weights are missing ({', '.join(missing[:3])}, ...)")
        self.switchkd.version = version


class Rule:
    """Our rule at work in a model runner: who its requests are, and what is called in place of vLLM's draws."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.version = 0
        self.requests: dict[str, Request] = {}
        stock = runner.sampler
        runner.sampler = PromptEnd(self, stock.logprobs_mode, stock.use_fp64_gumbel)
        runner.rejection_sampler = Acceptance(self)
        runner.drafter._sample_draft_tokens = self.draft

    def step(self) -> list[Request]:
        """The requests of the runner's step, in the order of its rows."""
        found = []
        for name in self.runner.input_batch.req_ids:
            asked = self.runner.requests[name].sampling_params.extra_args[ARGUMENTS]
            request = self.requests.get(asked["name"])
            if request is None:
                prompt = Prompt((asked["last_id"],), asked["prompt_id"], asked["sample_id"], asked["begun"])
                # Within the server's own processes: whoever took the request from a network has checked it.
                call = call_of(asked["call"], any_policy=True)
                request = self.requests[asked["name"]] = Request(call, prompt, asked["key"], self.version)
            found.append(request)
        return found

    def draft(self, hidden_BH: Tensor, sampling_metadata: Any) -> tuple[Tensor, None]:
        """The student's proposals (B,), in place of those that vLLM draws; None for their probabilities, which we keep."""
        logits = self.runner.drafter.model.compute_logits(hidden_BH)
        return propose(self.step(), logits), None

    def write(
        self, drafts: Sequence[Sequence[int]], logits: Sequence[Tensor], width: int, device: Any
    ) -> SamplerOutput:
        """What the requests write, filled up to `width` tokens each."""
        requests = self.step()
        unread = self.runner.discard_request_mask.np[: len(requests)].nonzero()[0].tolist()
        written = accept(requests, drafts, logits, unread)
        padded = [tokens + [NO_TOKEN] * (width - len(tokens)) for tokens in written]
        return SamplerOutput(torch.tensor(padded, dtype=torch.int32, device=device), logprobs_tensors=None)


class PromptEnd(Sampler):  # type: ignore[misc]
    """Stands for the sampler of requests without a draft: those that write the last token of their prompt."""

    def __init__(self, rule: Rule, logprobs_mode: Any, use_fp64_gumbel: bool) -> None:
        super().__init__(logprobs_mode, use_fp64_gumbel)
        self.rule = rule

    def forward(self, logits: Tensor, sampling_metadata: Any, *_: Any, **__: Any) -> SamplerOutput:
        """One token for each request."""
        rows = len(logits)
        return self.rule.write([()] * rows, [logits[:0]] * rows, 1, logits.device)


class Acceptance(nn.Module):
    """Stands for the rejection sampler."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, _: Any) -> SamplerOutput:
        """Up to as many tokens for each request as were drafted; `logits` are the teacher's, its bonus positions among them."""
        counts = list(metadata.num_draft_tokens)
        drafted, teacher_NV = metadata.draft_token_ids.tolist(), logits[metadata.target_logits_indices]
        drafts, start = [], 0
        for count in counts:
            drafts.append(drafted[start : start + count])
            start += count
        return self.rule.write(drafts, teacher_NV.split(counts), metadata.max_spec_len + 1, logits.device)
