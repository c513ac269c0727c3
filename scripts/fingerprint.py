"""Hashes of rollouts and of short trainings on the embedded pair: equal before and after a change that must change nothing.

Uses public names alone, so that it runs on any commit: `PYTHONPATH=<checkout>/src python scripts/fingerprint.py`.
Tokens are addressed, so their hash holds on any machine but for ties; the weights' last bits are the machine's.
"""

from __future__ import annotations

import hashlib
import json
import tempfile

import torch
import transformers

from switchkd import (
    ReferenceEngine,
    Sampling,
    SpeculativeEngine,
    Student,
    Switch,
    SwitchConfig,
    SwitchTrainer,
    Teacher,
    load_pair,
)

PROMPTS = [
    "Spell: sun, rain, garden, silver, winter.\n",
    "Sort by insertion: q d a v c b m x k.\n",
    "Add column by column: a 1 2, b 3 4, c 9 8, d 7 7, e 0 5, f 6 6, g 2 9.\n",
    "Reverse: x y z p q r s t u.\n",
    "Order by letter: k sun 3, b rain 7, z lamp 1, a road 9, m boat 4.\n",
    "Take from 155: a 4, b 7, c 9, d 2, e 8, f 5, g 3, h 6.\n",
]
METHODS = ("switch", "gkd", "kd", "skd", "adaswitch", "minillm", "distillm2", "random")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def rollouts() -> dict[str, str]:
    pair = load_pair("world:student", "world:teacher")
    sampling = {
        "sampled": Sampling(96),
        "shaped": Sampling(64, temperature=0.8, top_p=0.9, top_k=20),
        "greedy": Sampling(96, temperature=0),
    }
    found = {}
    for policy in (Student(), Teacher(), Switch(threshold=0.002)):
        for name, each in sampling.items():
            for engine in (ReferenceEngine(pair), SpeculativeEngine(pair, block_size=4)):
                made = engine.generate(PROMPTS, policy=policy, sampling=each, seed=3)
                found[f"{type(engine).__name__} {type(policy).__name__} {name}"] = digest(
                    [(r.token_ids, r.written_by_teacher) for r in made]
                )
    return found


def weights(method: str) -> str:
    pair = load_pair("world:student", "world:teacher")
    rows = [{"prompt": prompt, "completion": "sun: s u n"} for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SwitchTrainer(
            pair.student,
            pair.teacher,
            SwitchConfig(
                output_dir=folder, method=method, threshold=0.002, max_steps=10, per_device_train_batch_size=6,
                max_new_tokens=64, seed=5,
                learning_rate=1e-3, save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
            ),
            train_dataset=rows,
            processing_class=pair.tokenizer,
        )  # fmt: skip
        trainer.train()
        model = trainer.model
    numbers = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        numbers.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return numbers.hexdigest()[:16]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, value in rollouts().items():
        print(value, name)
    for method in METHODS:
        print(weights(method), "weights after 10 steps of", method)
