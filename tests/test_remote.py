"""The server of rollouts and its client, over a socket of this machine, with a backend that writes by the reference's rule."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sockets import running
from switchkd.errors import Unreachable, UserError
from switchkd.methods.config import SwitchConfig
from switchkd.records import Example, Prompt, Sampling
from switchkd.rollout.law import Student
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.serving.call import Call
from switchkd.serving.connection import Connection
from switchkd.serving.engine import VllmEngine, vllm_settings
from switchkd.serving.remote import RemoteVllm
from switchkd.serving.server import PROTOCOL, ROLLOUTS, STATE, WEIGHTS, RolloutServer, request_of, request_to
from switchkd.serving.started import Started, sizes_of
from test_serving import PROMPTS, Recording, check_equal, pair
from trainers import make_trainer

SHORT = Sampling(max_new_tokens=4)


@contextmanager
def serving(backend: Any, host: str = "127.0.0.1", **options: Any) -> Iterator[RolloutServer]:
    with running(RolloutServer(backend, host, 0, **options)) as server:
        yield server


def url_of(server: RolloutServer) -> str:
    return f"http://127.0.0.1:{server.port}"


def asked(server: RolloutServer, method: str, place: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, place, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def test_rollouts_and_weights_cross_as_they_are() -> None:
    backend = Recording()
    with serving(backend) as server:
        engine = VllmEngine(pair(), url_of(server))
        told: list[int] = []
        got = engine.generate(PROMPTS, Switch(threshold=0.3), SHORT, 3, keep_teacher=5, on_progress=told.append)
    wanted = ReferenceEngine(pair()).generate(PROMPTS, Switch(threshold=0.3), SHORT, 3, keep_teacher=5)
    check_equal(got, wanted)
    assert told == [len(PROMPTS)]
    for one, other in zip(got, wanted, strict=True):
        assert one.teacher_top is not None
        assert other.teacher_top is not None
        assert torch.equal(one.teacher_top.ids, other.teacher_top.ids)
    (loaded,) = backend.loaded
    assert {*loaded} == {name for name, _ in pair().student.named_parameters()}


def test_an_answer_by_other_weights_is_refused() -> None:
    backend = Recording()
    with serving(backend) as server:
        engine = VllmEngine(pair(), url_of(server))
        engine.generate(PROMPTS, Student(), SHORT)
        # Another run sends its student to the same server.
        backend.version += 1
        with pytest.raises(UserError, match="weights of version 2, not 1"):
            engine.generate(PROMPTS, Student(), SHORT)


def test_a_server_that_is_gone_is_asked_again_and_then_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", waits.append)
    with serving(Recording()) as server:
        remote = RemoteVllm(url_of(server), retries=3)
    with pytest.raises(Unreachable, match=r"does not answer .*4 times; start it again"):
        remote.rollouts(PROMPTS, Call(Student(), SHORT, 64, (1,)), 0)
    assert waits == [1, 2, 4]
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(Unreachable, match="start it again"):
        remote.load(tmp_path / "w.safetensors")


class Failing(Recording):
    """Fails once, as a server does whose machine is out of memory for a moment."""

    def rollouts(self, *given: Any) -> Any:
        if not self.loaded:
            self.loaded.append({})
            raise RuntimeError("for a moment")
        return super().rollouts(*given)


def test_a_failure_of_the_servers_is_told_in_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", lambda seconds: None)

    class Broken(Recording):
        def rollouts(self, *given: Any) -> Any:
            raise KeyError("model.layers.9.weight")

    call = Call(Student(), SHORT, 64, (1,))
    with serving(Broken()) as server:
        status, said = asked(server, "POST", ROLLOUTS, request_to(call, PROMPTS, 0))
        assert (status, said) == (500, {"error": "KeyError: 'model.layers.9.weight'"})
        with pytest.raises(Unreachable, match=r"\(KeyError: 'model.layers.9.weight'\), 2 times"):
            RemoteVllm(url_of(server), retries=1).rollouts(PROMPTS, call, 0)
    assert "Traceback" in capsys.readouterr().err


class BreakingOff(BaseRequestHandler):
    """Ends its first answer before it is whole."""

    answered = 0

    def handle(self) -> None:
        self.request.recv(65536)
        BreakingOff.answered += 1
        body = json.dumps({"protocol": PROTOCOL, "version": 0}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.request.sendall(head.encode() + (body[:9] if BreakingOff.answered == 1 else body))


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", waits.append)
    monkeypatch.setattr(BreakingOff, "answered", 0)
    with running(TCPServer(("127.0.0.1", 0), BreakingOff)) as server:
        connection = Connection(f"http://127.0.0.1:{server.server_address[1]}", "")
        assert connection.json(STATE) == {"protocol": PROTOCOL, "version": 0}
        assert waits == [1]
        BreakingOff.answered = 0
        with pytest.raises(Unreachable, match=r"IncompleteRead\(9 bytes read, \d+ more expected\)"):
            Connection(connection.url, "", retries=0).json(STATE)


@pytest.mark.filterwarnings("ignore")
def test_a_moments_failure_is_survived(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", lambda seconds: None)
    backend = Failing()
    with serving(backend) as server:
        answer = RemoteVllm(url_of(server)).rollouts(PROMPTS, Call(Student(), SHORT, 64, (1,)), 0)
    assert len(answer["lengths"]) == len(PROMPTS)


# ------ what a run asks before its first step


def started(**changes: Any) -> Started:
    models = {role: sizes_of(model.config) for role, model in pair().models.items()}
    return Started(**{"max_tokens": 64, "vocabulary_size": 64, "models": models, **changes})


def test_a_server_with_other_models_is_refused_at_once() -> None:
    assert sizes_of(pair().student.config) == {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    with serving(Recording(started())) as server:
        assert VllmEngine(pair(), url_of(server)).backend.started == started()
    wider = {**started().models, "student": {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 64}}
    told = "the student here, .*, has hidden_size 32, .* but that of vLLM hidden_size 48, num_hidden_layers 2, vocab_size 64"
    for wrong, words in (({"models": wider}, told), ({"vocabulary_size": 60}, "share 64 ids, but those of vLLM 60")):
        backend = Recording(started(**wrong))
        with serving(backend) as server, pytest.raises(UserError, match=words):
            VllmEngine(pair(), url_of(server))
        assert not backend.loaded
    with (
        serving(Recording(started(models=["student"]))) as server,
        pytest.raises(UserError, match="server's models is"),
    ):
        RemoteVllm(url_of(server))


def test_weights_that_a_server_would_not_take_are_not_sent() -> None:
    backend = Recording()
    with serving(backend, most_weights=4000) as server:
        with pytest.raises(UserError, match=r"takes 4000; start switchkd serve with a larger --weights-gib"):
            VllmEngine(pair(), url_of(server)).generate(PROMPTS, Student(), SHORT)
        status, said = asked(server, "POST", WEIGHTS, b"0" * 5000)
    assert status == 413
    assert "--weights-gib" in said["error"]
    assert not backend.loaded


LONG = [Example(Prompt((5,) * length, row), (7,) * 90) for row, length in enumerate((2, 55))]
WRITING: dict[str, Any] = {"teacher_signal": {"top_k": 8}, "max_new_tokens": 10}


@pytest.mark.parametrize("here", [True, False])
def test_a_run_whose_texts_vllm_has_no_room_for_ends_before_its_first_step(here: bool, tmp_path: Path) -> None:
    words = "come to 65 tokens, and vLLM takes 64; start it with a larger max_tokens"
    with serving(Recording(started())) as server:
        vllm = {"max_tokens": 64} if here else url_of(server)
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, pair(), LONG, vllm=vllm, **WRITING)
        with pytest.raises(UserError, match="one token long"):
            make_trainer(tmp_path, pair(), [Example(Prompt((5,), 0), ())], vllm=vllm, **WRITING)
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, pair(), LONG[:1], eval_dataset=[Example(LONG[1].prompt, ())], vllm=vllm, **WRITING)
    with serving(Recording(started())) as server:
        # What the data set answers is not written by vLLM, however long it is.
        make_trainer(tmp_path, pair(), LONG[:1], eval_dataset=LONG[1:], vllm=url_of(server), **WRITING)


def test_one_server_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwitchConfig, "world_size", property(lambda args: 2))
    with pytest.raises(UserError, match=r"the server http://127\.0\.0\.1:9, which serves one process, but there are 2"):
        make_trainer(tmp_path, pair(), vllm="http://127.0.0.1:9", **WRITING)


# ------ who may ask, and what


def test_only_this_machine_may_ask_where_there_is_no_key() -> None:
    with pytest.raises(UserError, match="SWITCHKD_SERVE_KEY"):
        RolloutServer(Recording(), "0.0.0.0", 0)
    with serving(Recording()) as server:
        assert asked(server, "GET", STATE) == (200, {"protocol": PROTOCOL, "version": 0, "most_weights": 1 << 34})
        assert asked(server, "GET", STATE, Host="evil.example")[0] == 421
        assert asked(server, "POST", ROLLOUTS, b"{}", Origin="http://evil.example")[0] == 403
        assert asked(server, "GET", "/etc/passwd")[0] == 404
        assert asked(server, "POST", "/v1/run", b"{}")[0] == 404


def test_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCHKD_SERVE_KEY", raising=False)
    with serving(Recording(), key="secret") as server:
        assert asked(server, "GET", STATE)[0] == 401
        assert asked(server, "GET", STATE, Authorization="Bearer secreT")[0] == 401
        with pytest.raises(UserError, match="the key is missing"):
            RemoteVllm(url_of(server))
        monkeypatch.setenv("SWITCHKD_SERVE_KEY", "secret")
        RemoteVllm(url_of(server))


def test_what_is_no_request_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    backend = Recording()
    with serving(backend, most_weights=4000) as server:
        for body, words in (
            (b"\x80\x04.", "no JSON"),
            (b"[" * 100_000, "no JSON"),
            (b"[]", "protocol"),
            (
                json.dumps({"protocol": PROTOCOL, "call": "{", "seed": 1, "prompts": [[[1], 0, 0, 0]]}).encode(),
                "no JSON",
            ),
            (json.dumps({"protocol": PROTOCOL, "call": "{}", "seed": 1, "prompts": []}).encode(), "lacks"),
            (
                json.dumps({"protocol": PROTOCOL, "call": "[]", "seed": 1, "prompts": [[[1], 0, 0, 0]]}).encode(),
                "mapping",
            ),
            (
                json.dumps({"protocol": PROTOCOL, "call": "{}", "seed": 1, "prompts": [[["a"], 0, 0, 0]]}).encode(),
                "mapping",
            ),
        ):
            status, said = asked(server, "POST", ROLLOUTS, body)
            assert status == 400, body
            assert words in said["error"]
        assert asked(server, "POST", WEIGHTS, b"\x80\x04N.")[0] == 400
        assert asked(server, "POST", WEIGHTS, b"0" * 5000)[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.putrequest("POST", WEIGHTS)
        connection.endheaders()
        assert connection.getresponse().status == 411
        connection.close()
        assert not backend.loaded
        save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
        assert RemoteVllm(url_of(server)).load(tmp_path / "w.safetensors") == 1
        assert torch.equal(backend.loaded[0]["w"], torch.ones(3))
        assert load_file(tmp_path / "w.safetensors").keys() == {"w"}


@pytest.mark.parametrize("row", [[[1, 2.5], 0, 0, 0], [[1], 0, 0], [[True], 0, 0, 0], [[1], 2**63, 0, 0], "text"])
def test_a_prompt_that_is_none_is_refused(row: Any) -> None:
    call = Call(Student(), SHORT, 64, (1,))
    text = json.loads(request_to(call, [Prompt((5, 6), 1)], 3))
    assert request_of(json.dumps(text).encode()) == (call, [Prompt((5, 6), 1)], 3)
    with pytest.raises(UserError, match="prompt"):
        request_of(json.dumps({**text, "prompts": [row]}).encode())


def test_what_a_run_says_of_vllm() -> None:
    assert vllm_settings("http://127.0.0.1:9")[0] == "http://127.0.0.1:9"
    url, teacher, options = vllm_settings({"teacher": "folder", "cache_gib": 2})
    assert (url, teacher, options.cache_gib) == (None, "folder", 2.0)
    assert vllm_settings("here")[0] is None
    with pytest.raises(UserError, match="did you mean 'cache_gib'"):
        vllm_settings({"cach_gib": 2})
    with pytest.raises(UserError, match="set it there"):
        vllm_settings({"url": "http://127.0.0.1:9", "block_size": 2})
    with pytest.raises(UserError, match="block_size is 0"):
        vllm_settings({"block_size": 0})
    for wrong in ("ftp://127.0.0.1", "127.0.0.1:80", "file:///etc/passwd"):
        with pytest.raises(UserError, match="give the address of a server"):
            RemoteVllm(wrong)
