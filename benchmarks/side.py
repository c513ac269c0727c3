"""One side of commits.py: a process of its own that does its task once for each line it reads, and answers with what it took.

It uses the package's public names, so that any commit of it serves: `PYTHONPATH=<checkout>/src python benchmarks/side.py TASK`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from switchkd import ModelPair, Prompt, Sampling, SpeculativeEngine, Switch, load_pair

Answer = dict[str, Any]


class Heads(TorchFunctionMode):
    """The seconds spent in matrix products with a head of at least that number of ids."""

    def __init__(self, ids: int) -> None:
        super().__init__()
        self.ids, self.seconds = ids, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, by the clock if it is a head's."""
        is_head = func is torch.nn.functional.linear and args[1].shape[0] >= self.ids
        started = time.perf_counter()
        result = func(*args, **kwargs or {})
        self.seconds += (time.perf_counter() - started) * is_head
        return result


def _pair(task: Answer) -> ModelPair:
    if task["folder"] is None:
        return load_pair("world:student", "world:teacher")
    student, teacher = (LlamaForCausalLM.from_pretrained(f"{task['folder']}/{role}") for role in ("student", "teacher"))
    return ModelPair(student, teacher)


def _without_ends(*models: PreTrainedModel) -> ModelPair:
    for model in models:
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    return ModelPair(*models)


def rollouts(task: Answer) -> Callable[[], Answer]:
    """SWITCH on texts that never end; with `heads` also the seconds of the heads' products, which no graph may hide."""
    loaded = _pair(task)
    pair = _without_ends(loaded.student, loaded.teacher)
    compiled = {"compile": True} if task["compiled"] else {}
    engine = SpeculativeEngine(pair, max_rows=len(task["prompts"]), **compiled)
    policy = Switch(threshold=task["threshold"], decay="constant")
    sampling = Sampling(max_new_tokens=task["new_tokens"])

    def run() -> Answer:
        heads = Heads(pair.vocabulary_size)
        started = time.perf_counter()
        if task["heads"]:
            with heads:
                found = engine.generate(task["prompts"], policy, sampling)
        else:
            found = engine.generate(task["prompts"], policy, sampling)
        seconds = time.perf_counter() - started
        writers = [writer for rollout in found for writer in rollout.written_by_teacher]
        return {
            "seconds": seconds,
            "heads": heads.seconds,
            "tokens": len(writers),
            "share": sum(writers) / len(writers),
            "parts": [engine.metrics.seconds[part] for part in ("student", "teacher", "policy")],
            "texts": [_digest(rollout.token_ids) for rollout in found],
        }

    return run


def operators(task: Answer) -> Callable[[], Answer]:
    """What torch's profiler says of one such call, the first of which warms up: operators by their own share of the time."""
    run = rollouts(task)

    def profiled() -> Answer:
        run()
        # There is one cycle; told to keep its events, torch 2.10 does not warn that later ones clear them.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
            answer = run()
        spent = {each.key: each.self_cpu_time_total for each in found.key_averages()}
        total = sum(spent.values())
        return answer | {"operators": sorted(((time / total, name) for name, time in spent.items()), reverse=True)}

    return profiled


def answers(task: Answer) -> Callable[[], Answer]:
    """An evaluation: the student's answers to all prompts, with the command's own batch of its day."""
    from switchkd.evaluation.generate import generate_answers
    from switchkd.records import Example

    pair = _pair(task)
    engine = SpeculativeEngine(ModelPair(pair.student, tokenizer=pair.tokenizer))
    examples = [Example(Prompt(tuple(ids), number), ()) for number, ids in enumerate(task["prompts"])]
    seeds: Answer = {"seed": 0}
    if "seeds" in inspect.signature(generate_answers).parameters:
        seeds = {"seeds": [0], "batch_size": 32}

    def run() -> Answer:
        started = time.perf_counter()
        sampling = Sampling(max_new_tokens=task["new_tokens"])
        found = generate_answers(engine, pair.tokenizer, examples, sampling=sampling, **seeds)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": sum(each.tokens for each in found),
            "texts": [_digest(each.text) for each in found],
        }

    return run


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def main() -> None:
    """Do the task of the command line for each line of the input."""
    task = json.loads(sys.argv[1])
    logging.disable_progress_bar()
    torch.set_num_threads(task["threads"])
    run = {"rollouts": rollouts, "answers": answers, "profile": operators}[task["kind"]](task)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


if __name__ == "__main__":
    main()
