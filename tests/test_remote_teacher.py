"""A teacher on a server: the loss and gradients of the teacher here, and what is refused, asked again and checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scoring_server import ScoringServer, scoring
from switchkd.distributions.shaping import top_logp
from switchkd.errors import Unreachable, UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.load import load_model
from switchkd.records import Example, Prompt
from switchkd.run.file import run_from_values
from switchkd.serving.teacher import KEY_ENV, RemoteTeacher
from switchkd.training.outlook import check_call
from tiny import EOS_ID, VOCABULARY, tiny_pair, tiny_tokenizer
from trainers import EXAMPLES, PROMPTS_ONLY, Gradients, assert_same_weights, history, make_trainer, weights

PAIR = tiny_pair("llama")
K = 8
# float32 log-probabilities cross JSON exactly. What is left: the server reads each text alone and we read padded batches, which
# differ by up to 3e-5 in a logit (tests/tiny.py), and the rest's mass is 1 - a sum there, and a sum of its own here.
TOLERANCE = 2e-4
GKD: dict[str, Any] = {"method": "gkd", "threshold": None, "teacher_signal": {"top_k": K}, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def teacher_model() -> Any:
    assert PAIR.teacher is not None
    return PAIR.teacher


@pytest.fixture
def server(teacher_model: Any) -> Iterator[ScoringServer]:
    with scoring(teacher_model) as found:
        yield found


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", waits.append)
    monkeypatch.delenv(KEY_ENV, raising=False)
    return waits


def trained(folder: Path, teacher: Any, **options: Any) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of a training."""
    gradients = Gradients()
    given = {**GKD, "max_steps": 2, "max_grad_norm": 0.0, **options}
    trainer = make_trainer(folder, PAIR, callbacks=[gradients], split=(2, 2), teacher_model=teacher, **given)
    trainer.train()
    return [line["loss"] for line in history(trainer) if "loss" in line], gradients.steps


@pytest.mark.parametrize(
    "options",
    [
        {"student_share": 0.5, "divergence": "forward_kl"},
        {"student_share": 1.0, "divergence": "reverse_kl"},
        {"student_share": 0.0, "divergence": {"name": "jensen_shannon", "teacher_weight": 0.1}},
        {"student_share": 1.0, "divergence": "reverse_kl", "long_term_weight": 1.0},
        {"student_share": 1.0, "divergence": "forward_kl", "weight": "importance"},
        {"student_share": 1.0, "divergence": "forward_kl", "weight": {"name": "trust", "outliers_by": "mask"}},
        {"student_share": 1.0, "divergence": "forward_kl", "replay_capacity": 4, "replay_share": 0.5},
        {"student_share": 1.0, "replayed_prefix": {"parts": 2, "until": 1.0, "weight": 0.5}},
    ],
    ids=["half", "reverse", "data", "long_term", "importance", "trust", "replay", "prefix"],
)
def test_loss_and_gradients_are_those_of_the_teacher_here(
    options: dict[str, Any], server: ScoringServer, tmp_path: Path, teacher_model: Any
) -> None:
    theirs, their_gradients = trained(tmp_path / "remote", server.url, **options)
    ours, our_gradients = trained(tmp_path / "here", teacher_model, **options)
    assert server.completions
    assert theirs == pytest.approx(ours, rel=TOLERANCE)
    for name, wanted in our_gradients[0].items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(their_gradients[0][name], wanted, rtol=TOLERANCE, atol=TOLERANCE * scale)


def test_a_run_says_the_teachers_name_and_its_card_no_address(server: ScoringServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PAIR, teacher_model=server.url, **GKD)
    assert f"learns from teacher at {server.url}: " in trainer.describe()
    assert "| teacher | `teacher` |" in trainer.card()
    assert server.url not in trainer.card()


def test_an_evaluation_asks_the_server_too(server: ScoringServer, tmp_path: Path, teacher_model: Any) -> None:
    losses = []
    for name, teacher in (("remote", server.url), ("here", teacher_model)):
        options = {**GKD, "weight": "importance", "per_device_eval_batch_size": 3}
        trainer = make_trainer(tmp_path / name, PAIR, eval_dataset=PROMPTS_ONLY, teacher_model=teacher, **options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


def test_texts_go_in_few_requests_and_each_once(server: ScoringServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PAIR, split=(16, 1), teacher_model=server.url, **{**GKD, "max_steps": 1})
    begun = len(server.completions)
    examples = [Example(Prompt((5, 6 + row), row), (7, 8, EOS_ID)) for row in range(20)]
    scored = trainer._loss.scored([*examples, examples[3]])
    assert sorted(len(asked["prompt"]) for asked in server.completions[begun:]) == [4, 8, 8]
    assert scored[3] is scored[20]


def read(server: ScoringServer, example: Example, top_k: int = K, **options: Any) -> Any:
    (found,) = RemoteTeacher(server.url, top_k, VOCABULARY, **options).read([example])
    return found.teacher_top


@pytest.mark.parametrize("top_k", [1, K, VOCABULARY, 10 * VOCABULARY])
def test_the_likeliest_ids_and_the_rest_are_those_of_the_teacher_here(teacher_model: Any, top_k: int) -> None:
    example = EXAMPLES[0]
    with scoring(teacher_model, max_logprobs=VOCABULARY) as server:
        found = read(server, example, top_k)
    text = [*example.prompt.token_ids, *example.response_ids]
    with torch.no_grad():
        logits = teacher_model(input_ids=torch.tensor([text])).logits[0]
    wanted = top_logp(logits[len(example.prompt.token_ids) - 1 : -1], top_k)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.logp, wanted.logp, rtol=1e-6, atol=1e-6)
    # Probabilities, since 1 - a sum has no relative accuracy: its terms are rounded to 6e-8 of about 1.
    torch.testing.assert_close(found.rest_logp.exp(), wanted.rest_logp.exp(), rtol=0, atol=1e-6)
    assert (found.rest_logp == -torch.inf).all() == (top_k >= VOCABULARY)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        # 1 - the sum is 2e-7, but each of the 62 others is at most as likely as the last that is kept.
        ({7: -2e-7, 8: -40.0}, -torch.inf, -40 + math.log(62)),
        # 1 - the sum is below 0.
        ({7: 0.0, 8: -16.0}, -torch.inf, -torch.inf),
        # The token that stands there is one of the others.
        ({7: -18.0, 8: 0.0, 9: -17.0}, -18.0, -18.0),
        ({7: -3.0, 8: -1.0, 9: -1.5}, math.log(1 - math.exp(-1) - math.exp(-1.5)), None),
    ],
    ids=["bounded", "nothing", "written", "plain"],
)
def test_a_rest_that_rounding_ate_is_bounded_by_what_is_known(
    server: ScoringServer, said: dict[int, float], least: float, most: float | None
) -> None:
    teacher = RemoteTeacher(server.url, 2, VOCABULARY)
    entries = {str(token_id): _entry(logp) for token_id, logp in said.items()}
    server.fault = lambda place, asked: (200, {"choices": [{"index": 0, "prompt_logprobs": [None, None, entries]}]})
    (found,) = teacher.read([Example(Prompt((5, 6), 0), (7,))])
    assert found.teacher_top is not None
    rest = float(found.teacher_top.rest_logp)
    # float32's rounding of a number up to 40.
    assert least - 1e-5 <= rest <= (least if most is None else most) + 1e-5


# ------ addresses, models, keys


def test_a_server_of_several_models_is_asked_for_one(server: ScoringServer) -> None:
    server.names = ["teacher", "other"]
    with pytest.raises(UserError, match=r"has 2 models; name one of teacher, other, as http://127.*#teacher"):
        read(server, EXAMPLES[0])
    with pytest.raises(UserError, match="has no model 'thrid'; name one of"):
        RemoteTeacher(f"{server.url}#thrid", K, VOCABULARY)
    teacher = RemoteTeacher(f"{server.url}/v1/#other", K, VOCABULARY)
    assert (teacher.name, teacher.url) == ("other", server.url)
    assert server.completions[-1]["model"] == "other"


def test_the_key_comes_from_the_environment_and_is_never_said(
    server: ScoringServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret-key"
    with pytest.raises(UserError, match=r"refuses: Unauthorized, not None; set \$SWITCHKD_TEACHER_KEY to its key"):
        read(server, EXAMPLES[0])
    monkeypatch.setenv(KEY_ENV, "wrong-key")
    with pytest.raises(UserError, match=r"refuses: Unauthorized, not Bearer \[key\]"):
        read(server, EXAMPLES[0])
    monkeypatch.setenv(KEY_ENV, "secret-key")
    read(server, EXAMPLES[0])
    with pytest.raises(UserError, match="not encrypted"):
        RemoteTeacher("http://teacher.example:8000", K, VOCABULARY)
    for wrong in (
        "http://user:pass@127.0.0.1:1",
        "http://",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://[::1",
    ):
        with pytest.raises(UserError, match="give the address of a server"):
            RemoteTeacher(wrong, K, VOCABULARY)


def test_a_redirect_is_not_followed(server: ScoringServer) -> None:
    server.fault = lambda place, asked: (302, {}) if place == "/v1/models" else None
    with pytest.raises(UserError, match="error 302; check the address"):
        read(server, EXAMPLES[0])


# ------ what does not fit


def test_more_ids_than_the_server_says_is_told_with_the_option(teacher_model: Any) -> None:
    with (
        scoring(teacher_model, max_logprobs=20) as server,
        pytest.raises(
            UserError,
            match=r"max allowed: 20 .*; a server .* --max-logprobs 64: start it so, or lower teacher_signal.top_k",
        ),
    ):
        read(server, EXAMPLES[0], 64)


def test_another_vocabulary_is_seen_before_the_first_step(server: ScoringServer) -> None:
    with pytest.raises(UserError, match=r"out of vocabulary; .* first and last token, 0 and 99"):
        RemoteTeacher(server.url, K, 100)
    with pytest.raises(UserError, match=r"has token id '\d+' among the likeliest, but the student knows ids below 16"):
        RemoteTeacher(server.url, K, 16)


def test_another_tokenizer_is_seen_where_the_server_has_one(teacher_model: Any) -> None:
    ours = tiny_tokenizer()
    for theirs, fits in ((None, True), (ours, True), (tiny_tokenizer(("answer", "The", "is")), False)):
        with scoring(teacher_model, theirs) as server:
            if fits:
                RemoteTeacher(server.url, K, VOCABULARY, ours)
                continue
            with pytest.raises(UserError, match="differ: 'The answer is"):
                RemoteTeacher(server.url, K, VOCABULARY, ours)


def test_a_text_that_is_too_long_for_the_server_is_seen_before_the_first_step(
    server: ScoringServer, tmp_path: Path
) -> None:
    server.max_model_len = 10
    with pytest.raises(UserError, match="reads 9 at most"):
        make_trainer(tmp_path, PAIR, teacher_model=server.url, **GKD)


def _entry(logp: Any) -> dict[str, Any]:
    return {"logprob": logp, "rank": 1, "decoded_token": "x"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "does not say 2 ids"),
        ([1, 2], "does not say 2 ids"),
        ({"1": _entry(-1), "2": _entry(-1), "3": _entry(-2), "4": _entry(-2)}, "does not say 2 ids"),
        ({"1": _entry(-1), "2": _entry(-1)}, "says nothing of token 7"),
        ({"7": _entry(-1), "07": _entry(-1), "8": _entry(-2)}, "one id twice"),
        ({"7": _entry(-1), "-1": _entry(-1)}, "token id '-1'"),
        ({"7": _entry(-1), "99999": _entry(-1)}, "token id '99999'"),
        ({"7": _entry(-1), "x": _entry(-1)}, "token id 'x'"),
        ({"7": _entry(float("nan")), "8": _entry(-1)}, "has nan where"),
        ({"7": _entry(float("inf")), "8": _entry(-1)}, "has inf where"),
        ({"7": _entry(3.5), "8": _entry(-1)}, "has 3.5 where"),
        ({"7": _entry(None), "8": _entry(-1)}, "has None where"),
        ({"7": _entry(True), "8": _entry(-1)}, "has True where"),
        ({"7": _entry("-1"), "8": _entry(-1)}, "has -1 where"),
        ({"7": -1.0, "8": _entry(-1)}, "has None where"),
        ({"7": _entry(-0.1), "8": _entry(-0.1)}, "of probability 1.81 together"),
        ({"7": _entry(-20), "8": _entry(-30)}, "of probability 2.06.*e-09 together"),
    ],
    ids=str,
)
def test_no_number_is_believed(server: ScoringServer, said: Any, words: str) -> None:
    teacher = RemoteTeacher(server.url, 2, VOCABULARY)
    server.fault = lambda place, asked: (200, {"choices": [{"index": 0, "prompt_logprobs": [None, None, said]}]})
    with pytest.raises(UserError, match=words):
        teacher.read([Example(Prompt((5, 6), 0), (7,))])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "says nothing of each token"),
        ([], "says nothing of each token"),
        ({"choices": {}}, "says nothing of each token"),
        ({"choices": [{"index": 1, "prompt_logprobs": [None] * 3}]}, "says nothing of each token of text 0"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None] * 2}]}, "says nothing of each token of text 0"),
        ({"choices": [{"index": 0, "prompt_logprobs": None}]}, "says nothing of each token of text 0"),
        (b"<html>", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_refused(server: ScoringServer, answer: Any, words: str) -> None:
    teacher = RemoteTeacher(server.url, 2, VOCABULARY)
    server.fault = lambda place, asked: (200, answer)
    with pytest.raises(UserError, match=words):
        teacher.read([Example(Prompt((5, 6), 0), (7,))])


def test_what_lists_no_models_is_no_server_of_vllm(server: ScoringServer) -> None:
    for answer in ({}, {"data": []}, {"data": [{"id": 3}]}, {"data": "x"}, {"data": [{"id": "\x1b[2J"}]}):
        server.fault = lambda place, asked, answer=answer: (200, answer)
        with pytest.raises(UserError, match="lists no models"):
            read(server, EXAMPLES[0])


# ------ away for a moment, and for good


def test_a_moments_failure_is_survived(server: ScoringServer, no_waits: list[float]) -> None:
    teacher = RemoteTeacher(server.url, K, VOCABULARY)
    left = [503, 429, 500]
    server.fault = lambda place, asked: (left.pop(), {"error": "busy"}) if left else None
    (found,) = teacher.read([EXAMPLES[0]])
    assert found.teacher_top is not None
    assert no_waits == [1, 2, 4]


def test_a_run_whose_teacher_goes_away_leaves_a_checkpoint_and_goes_on_from_it(
    server: ScoringServer, tmp_path: Path
) -> None:
    """With a replay, which a step that is made twice must not fill twice."""
    options = {**GKD, "student_share": 1.0, "replay_capacity": 4, "replay_share": 0.5, "max_steps": 5, "split": (2, 2)}
    whole = make_trainer(tmp_path / "whole", PAIR, teacher_model=server.url, **options)
    whole.train()
    broken = make_trainer(tmp_path / "run", PAIR, teacher_model=server.url, **options)
    server.fault = lambda place, asked: (502, {}) if broken.state.global_step == 2 else None
    with pytest.raises(Unreachable, match=r"does not answer \(error 502\), 5 times"):
        broken.train()
    server.fault = lambda place, asked: None
    resumed = make_trainer(tmp_path / "run", PAIR, teacher_model=server.url, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]


# ------ methods and settings that ask for more


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "switch"}, "policy switch asks the teacher for each token .* let switchkd serve write"),
        ({"method": "seqkd", "teacher_signal": None}, "has it write text; let the server write it beforehand"),
        ({"method": "gkd", "teacher_text_share": 0.5}, "teacher_text_share has it write text"),
        ({"method": "gkd", "rewrite": {}}, "rewrite has it write text"),
        ({"method": "gkd", "weight": "release"}, "the weight release"),
        ({"method": "gkd", "teacher_signal": None}, r"set teacher_signal: \{top_k: 20\}"),
        ({"method": "gkd", "vllm": "here"}, "vllm writes with a teacher of its own"),
        ({"method": "gkd", "teacher_offload": "cpu"}, "teacher_offload is 'cpu'"),
        ({"method": "gkd", "teacher_dtype": "float32"}, "teacher_dtype is 'float32'"),
        ({"method": "gkd", "teacher_model_init_kwargs": {"revision": "x"}}, "teacher_model_init_kwargs is"),
        ({"method": "gkd", "loss_temperature": 2.0}, "loss_temperature is 2.0"),
    ],
)
def test_what_a_server_cannot_say_is_refused_from_python_and_from_a_run_file(
    options: dict[str, Any], words: str
) -> None:
    given = {"teacher_signal": {"top_k": 8}, **options}
    with pytest.raises(UserError, match=words):
        check_call(SwitchConfig(output_dir="unused", **given), "student", "http://127.0.0.1:9")
    values = {"student": "s", "train_data": "d", "output_dir": "unused", "teacher": "http://127.0.0.1:9", **given}
    run = run_from_values(copy.deepcopy(values), "here")
    with pytest.raises(UserError, match=words):
        run.config()


def test_quantization_of_what_is_elsewhere_is_refused_and_so_is_an_address_as_a_model() -> None:
    values: dict[str, Any] = {"student": "s", "train_data": "d", "output_dir": "unused", "method": "gkd"}
    values |= {"teacher": "http://127.0.0.1:9", "teacher_signal": {"top_k": 8}}
    run = run_from_values({**values, "teacher_quantization": "4bit"}, "here")
    with pytest.raises(UserError, match="teacher_quantization is '4bit'"):
        run.config()
    with pytest.raises(UserError, match="is an address"):
        load_model("http://127.0.0.1:9")
