"""What a teacher on a server can be asked for: how likely the tokens of finished texts are, and nothing else."""

from __future__ import annotations

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.rollout.policies import POLICY

# Of a teacher that is loaded here.
_OF_LOADED = ("teacher_dtype", "teacher_model_init_kwargs")


def check_remote_teacher(args: SwitchConfig, address: str, *, beside_loaded: bool = False) -> None:
    """Raise UserError where a run needs more of its teacher than a server of vLLM's says of finished texts.

    `beside_loaded`: settings of teachers that are loaded here have others to act on.
    """
    plan = args.plan
    if args.vllm is not None:
        raise UserError(
            f"teacher is {address}, but vllm writes with a teacher of its own; give the name of that one, or leave vllm out"
        )
    if plan.rolls_out and plan.policy.needs_teacher:
        raise UserError(
            f"teacher is {address}, and policy {POLICY.name_of(type(plan.policy))} asks the teacher for each token that is "
            f"written: let switchkd serve write (vllm: its address, docs/vllm.md), or take a method whose text the student or the "
            f"data writes, such as gkd or kd"
        )
    writes = {
        "teacher_text_share": plan.teacher_text_share > 0,
        "rewrite": plan.rewrite is not None,
        f"method {args.method_name!r}": plan.teacher_text is not None,
    }
    for key in (key for key, asked in writes.items() if asked):
        raise UserError(
            f"teacher is {address}, and {key} has it write text; let the server write it beforehand and give it as train_data, "
            f"or load the teacher here"
        )
    if plan.objective.margin_top_k:
        raise UserError(
            f"teacher is {address}, but the weight release reads it at the student's likeliest tokens, and a server says its own "
            f"alone; load the teacher here"
        )
    if plan.teacher_signal is None:
        raise UserError(
            f"teacher is {address}, and a server says its likeliest ids alone; set teacher_signal: {{top_k: 20}}"
        )
    if beside_loaded:
        return
    if args.teacher_offload != "none":
        raise UserError(f"teacher_offload is {args.teacher_offload!r}, but {address} is elsewhere; leave it out")
    for key in _OF_LOADED:
        if getattr(args, key) is not None:
            raise UserError(f"{key} is {getattr(args, key)!r}, but {address} is loaded by its server; leave it out")
