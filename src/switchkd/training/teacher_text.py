"""Responses that the teacher writes once, kept in a file: the data of sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import name_of
from switchkd.progress import progress_bar
from switchkd.records import Example
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Teacher

# Numbers of each weight tensor that go into the teacher's fingerprint: enough to tell one training from another.
_NUMBERS = 64


def teacher_text(
    path: Path,
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    engine: Engine,
    args: SwitchConfig,
    *,
    writes: bool,
) -> list[Example]:
    """The examples with the teacher's responses: read from `path`, or written there first.

    The file has one JSON line a prompt with `prompt_id`, `prompt_ids` and `response_ids`. The manifest beside it, written last,
    says what the text depends on. Where `writes` is False, another process of the run makes the file, and this one waits for it.
    Raises UserError for text that depends on anything else, naming it, and for a file that was changed.
    """
    manifest = _manifest_of(teacher, examples, args)
    while not _is_there(path, manifest):
        if writes:
            _write(path, manifest, examples, engine, args)
        else:
            # No collective: writing may take longer than those wait.
            time.sleep(1)
    responses = {row["prompt_id"]: row["response_ids"] for row in map(json.loads, path.read_text().splitlines())}
    return [replace(example, response_ids=tuple(responses[example.prompt.prompt_id])) for example in examples]


def _manifest_of(teacher: PreTrainedModel, examples: Sequence[Example], args: SwitchConfig) -> dict[str, Any]:
    """All that the teacher's text depends on, as JSON values."""
    # The student is left out: its drafts decide which sample of the teacher's distribution is drawn, not the distribution.
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
        "sampling": asdict(args.sampling),
        "seed": args.seed,
    }


def _manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _is_there(path: Path, manifest: dict[str, Any]) -> bool:
    remedy = "delete it to have it written again"
    try:
        found = json.loads(_manifest_path(path).read_text(encoding="utf-8"))
        text = path.read_bytes()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"the teacher's text in {path} cannot be read ({error}); {remedy}") from error
    for key, value in manifest.items():
        if found.get(key) != value:
            raise UserError(
                f"the teacher's text in {path} was made with other {key} ({found.get(key)}, now {value}); {remedy}, or set "
                f"teacher_text to another file"
            )
    if found["sha256"] != hashlib.sha256(text).hexdigest():
        raise UserError(f"the teacher's text in {path} was changed after it was written; {remedy}")
    return True


def _write(
    path: Path, manifest: dict[str, Any], examples: Sequence[Example], engine: Engine, args: SwitchConfig
) -> None:
    prompts, policy = [example.prompt for example in examples], Teacher()
    with progress_bar(Console(stderr=True)) as progress:
        counter = progress.counter(progress.add_task("the teacher writes", total=len(prompts)))
        rollouts = engine.generate(prompts, policy=policy, sampling=args.sampling, seed=args.seed, on_progress=counter)
    rows = (
        {"prompt_id": r.prompt.prompt_id, "prompt_ids": r.prompt.token_ids, "response_ids": r.token_ids}
        for r in rollouts
    )
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_atomically(path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(_manifest_path(path), json.dumps({**manifest, "sha256": digest}, indent=2) + "\n")
