"""The acceptance rule without a server: a loop of two plain models drafts and scores, and the tokens are the reference's."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from switchkd.distributions.noise import row_keys
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import AdaSwitch, Early, Late, Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.serving.acceptance import Request, accept, propose
from switchkd.serving.call import Call, answer_of, call_of, rollouts_of
from switchkd.serving.engine import VllmEngine
from switchkd.serving.heads import Padding, padded_copy, padding_of
from switchkd.serving.started import Started
from tiny import EOS_ID, tiny_pair

POLICIES: list[Policy] = [
    Student(),
    Teacher(),
    Switch(threshold=0.3, decay_rate=0.02),
    Switch(threshold=0.15, decay="constant"),
    AdaSwitch(factor=1.2, window=3),
    Early(),
    Late(),
    Mix(teacher_share=0.4),
    Interleave(keep_top_k=5),
    TrustRegionBlend(),
]
PROMPTS = [Prompt(tuple(ids), at) for at, ids in enumerate(([5, 9, 11], [7, 8], [3, 4, 5, 6, 7, 8, 9], [20, EOS_ID]))]


@cache
def pair() -> ModelPair:
    """In float64, where reading a text whole and through a cache leaves a few roundings only."""
    return tiny_pair("llama", dtype=torch.float64)


def logits_of(model: torch.nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


class ToyServer:
    """A server that knows its own loop alone: it drafts up to `size` tokens, reads them with the teacher, and asks `accept`.

    Every third step it drafts fewer, as a server does that is short of room, and the first step of a request reads a part of
    its prompt only.
    """

    def __init__(self, call: Call, prompts: list[Prompt], seed: int, size: int) -> None:
        keys = row_keys(seed, prompts).tolist()
        self.requests = [Request(call, p, key, version=7) for p, key in zip(prompts, keys, strict=True)]
        self.texts = [list(p.token_ids[:-1]) for p in prompts]
        self.size = size

    def run(self) -> list[Request]:
        written = accept(self.requests, [()] * len(self.requests), self._nothing(), unread=range(len(self.requests)))
        assert all(len(tokens) == 1 for tokens in written)
        written = accept(self.requests, [()] * len(self.requests), self._nothing())
        steps = 0
        while True:
            for text, tokens in zip(self.texts, written, strict=True):
                text += tokens
            live = [row for row, request in enumerate(self.requests) if not request.finished]
            if not live:
                return self.requests
            requests, steps = [self.requests[row] for row in live], steps + 1
            drafts: list[list[int]] = [[] for _ in live]
            for _ in range(self.size):
                texts = [self.texts[row] + draft for row, draft in zip(live, drafts, strict=True)]
                logits = torch.stack([logits_of(pair().student, text)[-1] for text in texts])
                for draft, token in zip(drafts, propose(requests, logits).tolist(), strict=True):
                    draft.append(token)
            kept = self.size if steps % 3 else 1
            read = []
            for row, draft in zip(live, drafts, strict=True):
                del draft[kept:]
                read.append(logits_of(pair().teacher, self.texts[row] + draft)[-len(draft) - 1 : -1])
            made = accept(requests, drafts, read)
            written = [made[live.index(row)] if row in live else [] for row in range(len(self.requests))]

    def _nothing(self) -> list[Tensor]:
        return [torch.empty(0, pair().vocabulary_size)] * len(self.requests)


def served(policy: Policy, sampling: Sampling, size: int = 3, **options: Any) -> list[Rollout]:
    call = Call(policy, sampling, pair().vocabulary_size, pair().eos_ids, **options)
    # Through the text that crosses the wire.
    call = call_of(call.to_json())
    requests = ToyServer(call, PROMPTS, seed=3, size=size).run()
    answer = answer_of([each.log for each in requests], [each.version for each in requests])
    return rollouts_of(answer, PROMPTS, call, version=7)


def check_equal(got: list[Rollout], wanted: list[Rollout]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert one.written_by_teacher == other.written_by_teacher
        assert one.finish_reason == other.finish_reason
        assert one.prompt == other.prompt
        for name in ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part", "margin"):
            # float64 through two layers with weights scaled by 20, as in test_reference_engine.py.
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_rule_writes_what_the_reference_writes(policy: Policy, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=14, temperature=temperature, top_k=0 if temperature == 0 else 20)
    wanted = ReferenceEngine(pair()).generate(PROMPTS, policy, sampling, seed=3)
    check_equal(served(policy, sampling), wanted)


def test_what_is_kept_beside_the_tokens_is_the_references_too() -> None:
    sampling, policy = Sampling(max_new_tokens=9), Student()
    reference = ReferenceEngine(pair(), margin_top_k=4).generate(PROMPTS, policy, sampling, 3, keep_teacher=5)
    got = served(policy, sampling, asks_teacher=True, top_k=5, margin_top_k=4)
    check_equal(got, reference)
    drafted = SpeculativeEngine(pair(), 4).generate(PROMPTS, policy, sampling, 3, keep_teacher=5)
    for one in (*got, *drafted):
        wanted = reference[one.prompt.prompt_id].teacher_top
        assert one.teacher_top is not None
        assert wanted is not None
        assert one.teacher_hidden is None
        assert one.teacher_top.ids.shape == (len(one.token_ids), 5)
        assert torch.equal(one.teacher_top.ids, wanted.ids)
        # Kept in float32: its rounding at up to 20 nats.
        torch.testing.assert_close(one.teacher_top.logp, wanted.logp, rtol=1e-6, atol=1e-6)
        whole = torch.cat([one.teacher_top.logp, one.teacher_top.rest_logp[:, None]], dim=1).logsumexp(dim=1)
        torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-6)


def test_a_rollout_begins_with_part_of_a_response() -> None:
    begun = [replace(prompt, begun=1) for prompt in PROMPTS]
    call = Call(Switch(threshold=0.3), Sampling(max_new_tokens=6), pair().vocabulary_size, pair().eos_ids)
    requests = ToyServer(call, begun, seed=3, size=4).run()
    got = rollouts_of(answer_of([r.log for r in requests], [7] * 4), begun, call, version=7)
    check_equal(got, ReferenceEngine(pair()).generate(begun, call.policy, call.sampling, seed=3))


def test_a_draft_that_is_not_there_is_told_and_never_made_up() -> None:
    call = Call(Teacher(), Sampling(max_new_tokens=6), 64, (EOS_ID,))
    request = Request(call, Prompt((5, 9), 0), key=1, version=0)
    nothing = [torch.empty(0, 64)]
    assert accept([request], [()], nothing) == [[9]]
    propose([request], torch.zeros(1, 64))
    # vLLM's own zeros, where it has no room for a draft.
    drafted = int(request.drafted.tokens[0])
    assert accept([request], [[drafted + 1]], [torch.zeros(1, 64)]) == [[EOS_ID]]
    assert request.lost
    assert not request.log.token_ids
    assert request.finished


def test_numbers_that_are_none_end_a_rollout() -> None:
    call = Call(Teacher(), Sampling(max_new_tokens=6), 64, (EOS_ID,))
    request = Request(call, Prompt((5, 9), 0), key=1, version=0)
    accept([request], [()], [torch.empty(0, 64)])
    propose([request], torch.zeros(1, 64))
    drafted = [int(token) for token in request.drafted.tokens]
    accept([request], [drafted], [torch.full((1, 64), torch.nan)])
    assert "NaN" in request.fault
    assert not request.log.token_ids


# ------ what comes from a network


def test_a_call_survives_its_text() -> None:
    call = Call(Switch(threshold=0.2, decay="linear"), Sampling(max_new_tokens=5, top_p=0.9), 64, (1, 2), True, 8, 4)
    assert call_of(call.to_json()) == call
    assert call_of(call.to_json()) is call_of(call.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"name": "os:system"}}, "since another one would be code"),
        ({"policy": {"name": "switch", "threshold": "high"}}, "threshold is 'high'"),
        ({"policy": ["switch"]}, "it has to be a mapping"),
        ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"sampling": {"max_new_tokens": 4, "no_repeat_ngram_size": 3}}, "set it to 0"),
        ({"sampling": {"seed": 4}}, "no 'seed'"),
        ({"vocabulary_size": "many"}, "vocabulary_size is 'many'"),
        ({"vocabulary_size": 0}, "vocabulary_size is 0"),
        ({"eos_ids": "1"}, "eos_ids is '1'"),
        ({"eos_ids": [64]}, "eos_ids has 64"),
        ({"run": "rm"}, "no 'run'"),
    ],
)
def test_a_call_that_is_none_is_refused(change: dict[str, object], message: str) -> None:
    text = Call(Student(), Sampling(), 64, (1,)).to_json()
    with pytest.raises(UserError, match=message):
        call_of(json.dumps({**json.loads(text), **change}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", torch.tensor([1, 99, 3]), "token id 99"),
        ("token_ids", torch.tensor([1.0, 2.0, 3.0]), "token_ids is torch.float32"),
        ("divergence", torch.zeros(2, dtype=torch.float64), "divergence is"),
        ("lengths", torch.tensor([9]), "have \\[9\\] tokens"),
        ("versions", torch.tensor([6]), "version 6, not 7"),
        ("top_ids", torch.tensor([[64, 1]] * 3), "outside the vocabulary"),
        ("top_logp", None, "top_logp is nothing"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(name: str, value: Tensor | None, message: str) -> None:
    call = Call(Teacher(), Sampling(max_new_tokens=3), 64, (EOS_ID,), top_k=2)
    wanted = ReferenceEngine(pair()).generate([[5, 9]], Teacher(), call.sampling, keep_teacher=2)[0]
    columns = ("token_ids", "written_by_teacher", "divergence", "threshold", "student_logp", "teacher_logp")
    assert len(wanted.token_ids) == 3
    answer = {key: torch.tensor(getattr(wanted, key), dtype=torch.float64) for key in columns[2:]}
    answer |= {key: torch.tensor(getattr(wanted, key), dtype=torch.float64) for key in ("law_logp", "teacher_part")}
    answer |= {"token_ids": torch.tensor(wanted.token_ids), "written_by_teacher": torch.tensor([True] * 3)}
    answer |= {"lengths": torch.tensor([3]), "versions": torch.tensor([7])}
    top = wanted.teacher_top
    assert top is not None
    answer |= {"top_ids": top.ids, "top_logp": top.logp, "top_rest_logp": top.rest_logp}
    check_equal(rollouts_of(answer, [wanted.prompt], call, version=7), [wanted])
    changed = {**answer, name: value}
    with pytest.raises(UserError, match=message):
        rollouts_of({key: each for key, each in changed.items() if each is not None}, [wanted.prompt], call, version=7)


class Recording:
    """A backend that takes weights and writes by the reference's rule, in the same process."""

    def __init__(self, started: Started | None = None) -> None:
        self.started = started
        self.version = 0
        self.loaded: list[dict[str, Tensor]] = []

    def load(self, path: object) -> int:
        from safetensors.torch import load_file

        self.loaded.append(load_file(str(path)))
        self.version += 1
        return self.version

    def rollouts(self, prompts: list[Prompt], call: Call, seed: int, on_progress: object = None) -> dict[str, Tensor]:
        requests = ToyServer(call, prompts, seed, size=3).run()
        return answer_of([r.log for r in requests], [self.version] * len(prompts))


def test_the_engine_sends_weights_when_they_have_changed_and_only_then() -> None:
    backend, model = Recording(), tiny_pair("llama", dtype=torch.float64)
    engine = VllmEngine(model, backend=backend)
    wanted = ReferenceEngine(model).generate(PROMPTS, Switch(threshold=0.3), Sampling(max_new_tokens=5), 3)
    for _ in range(2):
        check_equal(engine.generate(PROMPTS, Switch(threshold=0.3), Sampling(max_new_tokens=5), 3), wanted)
    assert len(backend.loaded) == 1
    weight = next(iter(model.student.parameters()))
    with torch.no_grad():
        weight.add_(1.0)
    engine.generate(PROMPTS, Student(), Sampling(max_new_tokens=2), 3)
    assert len(backend.loaded) == 2
    # An optimizer that torch's own count of changes does not see.
    weight.grad = torch.full_like(weight, 1e-3)
    torch.optim.AdamW([weight], lr=1e-12, fused=True).step()
    engine.generate(PROMPTS, Student(), Sampling(max_new_tokens=2), 3)
    assert len(backend.loaded) == 3
    name = next(iter(dict(model.student.named_parameters())))
    assert torch.equal(backend.loaded[2][name], weight)
    assert engine.generate([], Student()) == []


def test_the_engine_says_what_it_cannot_do() -> None:
    engine = VllmEngine(pair(), backend=Recording())
    with pytest.raises(UserError, match="teacher_signal"):
        engine.generate(PROMPTS, Switch(), keep_teacher="hidden")
    with pytest.raises(UserError, match="no_repeat_ngram_size"):
        engine.generate(PROMPTS, Student(), Sampling(no_repeat_ngram_size=3))
    with pytest.raises(UserError, match="has no teacher"):
        VllmEngine(ModelPair(pair().student), backend=Recording())
    with pytest.raises(UserError, match="keep_teacher is -1"):
        ReferenceEngine(pair()).generate(PROMPTS, Teacher(), keep_teacher=-1)


# ------ heads filled up with zeros


def test_a_wider_head_says_what_the_narrow_one_said(tmp_path: Path) -> None:
    """The turned part of a head is its first numbers; transformers turns all, so here it is seen at position 0, where none is."""
    model = tiny_pair("llama").student
    model.save_pretrained(tmp_path / "narrow")
    padding = padding_of(tmp_path / "narrow")
    assert padding == Padding(8, 32)
    into = padded_copy(tmp_path / "narrow", padding, tmp_path / "wide")
    assert json.loads((into / "config.json").read_text())["rope_parameters"]["rope_dim"] == 8
    wide = type(model).from_pretrained(into).eval()
    with torch.no_grad():
        for token in (5, 9, 30):
            ids = torch.tensor([[token]])
            # float32, with weights scaled by 20 (tests/tiny.py).
            torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    attention = wide.model.layers[0].self_attn
    queries = attention.q_proj.weight.unflatten(0, (-1, 32))
    old = model.model.layers[0].self_attn.q_proj.weight.unflatten(0, (-1, 8))
    # The score of a pair is their product over the root of the width.
    torch.testing.assert_close(queries[:, :8] / 32**0.5, old / 8**0.5)
    assert not queries[:, 8:].any()
    assert padding_of(into) is None
    assert padding_of(tmp_path / "nothing") is None
