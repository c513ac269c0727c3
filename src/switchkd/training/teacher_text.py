"""Responses that the teacher writes once and that are kept in a file: the data of sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.models.pair import name_of
from switchkd.records import Example, Sampling
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Teacher

# Numbers of each weight tensor that go into the teacher's fingerprint: enough to tell one training from another.
_NUMBERS = 64


def manifest_of(teacher: PreTrainedModel, examples: Sequence[Example], sampling: Sampling, seed: int) -> dict[str, Any]:
    """All that the teacher's text depends on, as JSON values.

    The student is not in it: it drafts, and so picks which draw from the teacher's distributions comes, not their law.
    """
    weights = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        if parameter.device.type != "meta":
            numbers = parameter.detach().flatten()[:_NUMBERS].double().tolist()
            weights.update(f"{name} {tuple(parameter.shape)} {numbers}".encode())
    prompts = json.dumps([(e.prompt.prompt_id, e.prompt.token_ids) for e in examples])
    return {
        "teacher": name_of(teacher),
        "weights": weights.hexdigest(),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "sampling": asdict(sampling),
        "seed": seed,
    }


def manifest_path(path: Path) -> Path:
    """Where the manifest of a file of the teacher's text is."""
    return path.with_name(f"{path.stem}.manifest.json")


def teacher_text(
    path: Path,
    manifest: dict[str, Any],
    examples: Sequence[Example],
    engine: Engine,
    sampling: Sampling,
    seed: int,
    *,
    writes: bool = True,
) -> list[Example]:
    """The examples with the teacher's responses: read from `path`, or written there first.

    One JSON line a prompt with `prompt_id`, `prompt_ids` and `response_ids`; the manifest beside it, written last, says what it
    depends on. Where `writes` is False another process of the run makes the file, and this one waits for it.
    Raises UserError for text that depends on anything else, naming it, and for a file that is not what was written.
    """
    while not _is_there(path, manifest):
        if writes:
            _write(path, manifest, examples, engine, sampling, seed)
        else:
            time.sleep(1)
    responses = {row["prompt_id"]: row["response_ids"] for row in map(json.loads, path.read_text().splitlines())}
    return [replace(example, response_ids=tuple(responses[example.prompt.prompt_id])) for example in examples]


def _is_there(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        found = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        text = path.read_bytes()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(
            f"the teacher's text in {path} cannot be read ({error}); delete it to have it written anew"
        ) from error
    for key, value in manifest.items():
        if found.get(key) != value:
            raise UserError(
                f"the teacher's text in {path} was made with other {key} ({found.get(key)}, now {value}); delete it to have it "
                f"written anew, or set teacher_text to another file"
            )
    if found["sha256"] != hashlib.sha256(text).hexdigest():
        raise UserError(
            f"the teacher's text in {path} was changed after it was written; delete it to have it written anew"
        )
    return True


def _write(
    path: Path, manifest: dict[str, Any], examples: Sequence[Example], engine: Engine, sampling: Sampling, seed: int
) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("the teacher writes", total=len(examples))
        rollouts = engine.generate(
            [example.prompt for example in examples],
            policy=Teacher(),
            sampling=sampling,
            seed=seed,
            on_progress=lambda finished: progress.update(task, completed=finished),
        )
    lines = [
        json.dumps({"prompt_id": r.prompt.prompt_id, "prompt_ids": r.prompt.token_ids, "response_ids": r.token_ids})
        for r in rollouts
    ]
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(manifest_path(path), json.dumps({**manifest, "sha256": digest}, indent=2) + "\n")
