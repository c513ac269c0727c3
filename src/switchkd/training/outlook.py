"""What a training is going to do, before its first step: whether its call and its texts fit, and the line that says it all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from switchkd.data.packed import lengths_of
from switchkd.errors import UserError, did_you_mean
from switchkd.methods.config import SwitchConfig
from switchkd.methods.remote_teacher import check_remote_teacher
from switchkd.models.pair import ModelPair, counted, name_of, parameter_count, rounded
from switchkd.records import Example
from switchkd.serving.colocated import VllmOptions
from switchkd.serving.engine import VllmEngine, vllm_settings
from switchkd.serving.teacher import is_address
from switchkd.training.rewriting import check_rewrite
from switchkd.training.taught import Taught, check_several_teachers, check_teacher_column
from switchkd.training.teachers import teacher_size

_KEYWORDS = (
    "model",
    "teacher_model",
    "args",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "callbacks",
    "peft_config",
)
Held = Sequence[Example] | Mapping[str, Sequence[Example]] | None


def check_call(args: SwitchConfig, model: object, teacher_model: object, unknown: Collection[str] = ()) -> None:
    """Raise UserError for arguments of another kind, and for a teacher that is missing or cannot do what the method asks of it.

    `unknown` are keywords of a trainer that are none here, though transformers may take them.
    """
    for name in sorted(unknown):
        if name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            raise UserError(
                f"SwitchTrainer takes no {name}: what is trained and measured are the method's objective and eval_scores; leave it "
                f"out"
            )
        instead = "; it is processing_class" if name == "tokenizer" else did_you_mean(name, _KEYWORDS)
        raise UserError(f"SwitchTrainer takes no {name}{instead}")
    if not isinstance(args, SwitchConfig):
        raise UserError(f"args is a {type(args).__name__}; pass a SwitchConfig, which takes the same settings and ours")
    brings_one = isinstance(model, ModelPair) and model.teacher is not None
    if args.plan.needs_teacher and teacher_model is None and not brings_one:
        raise UserError(f"method {args.method_name!r} learns from a teacher, but none was given; set teacher_model")
    _check_alone_with_server(args)
    several = isinstance(teacher_model, Mapping)
    if brings_one and (several or is_address(teacher_model)):
        given = (
            f"several ({', '.join(map(str, teacher_model))})" if isinstance(teacher_model, Mapping) else teacher_model
        )
        raise UserError(f"teacher_model is {given}, but model is a pair with a teacher; leave one of them out")
    if isinstance(teacher_model, Mapping):
        check_several_teachers(args, teacher_model)
    elif is_address(teacher_model) and args.plan.needs_teacher:
        check_remote_teacher(args, str(teacher_model))
    if not several:
        check_teacher_column(args)


def _check_alone_with_server(args: SwitchConfig) -> None:
    """Raise UserError where several processes would send their weights to one server of rollouts."""
    url = vllm_settings(args.vllm)[0] if args.vllm else None
    if url is not None and args.world_size > 1:
        raise UserError(
            f"vllm is the server {url}, which serves one process, but there are {args.world_size}; start the run in one, or leave "
            f"vllm out"
        )


def check_room(
    taught: Mapping[str, Taught], args: SwitchConfig, train: Sequence[Example] | None, held_out: Held
) -> None:
    """Raise UserError where a model, or a teacher on a server, has too few positions for the data or the rollouts."""
    plan, sets = args.plan, list(held_out.values()) if isinstance(held_out, Mapping) else [held_out or ()]
    longest, rolls_out = 0, plan.rolls_out or bool(plan.teacher_text or args.eval_scores)
    for prompt, response in chain.from_iterable(map(lengths_of, [train or (), *sets])):
        # A prompt alone is rolled out in an evaluation too.
        written = args.max_new_tokens if rolls_out or not response else 0
        longest = max(longest, prompt + max(response, written))
    if args.vllm and (settings := vllm_settings(args.vllm))[0] is None:
        # To start it here takes minutes.
        check_writing_room(settings[2], args, train, held_out)
    longest_prompt = max((each.prompt for each in train or ()), key=lambda it: len(it.token_ids), default=None)
    for pair, remote in taught.values():
        pair.check_room(longest)
        if remote is not None:
            remote.check_room(longest)
        if plan.rewrite and longest_prompt:
            check_rewrite(plan.rewrite, longest_prompt, pair, args)


def check_writing_room(
    vllm: VllmEngine | VllmOptions, args: SwitchConfig, train: Sequence[Example] | None, held_out: Held
) -> None:
    """Raise UserError where vLLM has no room for what it is going to write."""
    sets = list(held_out.values()) if isinstance(held_out, Mapping) else [held_out or ()]
    writes = args.plan.rolls_out or bool(args.plan.teacher_text)
    prompts = [prompt for prompt, _ in lengths_of(train or ()) if writes]
    # As an evaluation writes; see `check_room`.
    prompts += [prompt for prompt, response in chain(*map(lengths_of, sets)) if args.eval_scores or not response]
    if prompts:
        vllm.check_room(max(prompts) + args.max_new_tokens, min(prompts))


def teachers_in_words(taught: Mapping[str, Taught]) -> str:
    """Whom the student learns from, with sizes in parameters of those that are here; "" where there is nobody."""
    words = [(name, said) for name, each in taught.items() if (said := _in_words(each))]
    return " from " + " and ".join(f"{name}: {said}" if name else said for name, said in words) if words else ""


def _in_words(taught: Taught) -> str:
    pair, remote = taught
    if remote is not None:
        return f"{remote.name} at {remote.url}"
    return "" if pair.teacher is None else f"{name_of(pair.teacher)} ({rounded(teacher_size(pair))})"


def steps_of(args: SwitchConfig, count: int) -> int:
    """The optimizer steps over `count` rows of data."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(count / rows))


def describe_training(pair: ModelPair, args: SwitchConfig, count: int, learns_from: str) -> str:
    """One line: models and sizes (parameters), steps, sequences, tokens, and `count` rows of data; see `teachers_in_words`."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = steps_of(args, count)
    share = args.plan.rollout_share
    writes = f"{share:.0%} rolled out" if share else "the data set's text"
    size, most = rounded(parameter_count(pair.student)), rounded(steps * rows * args.max_new_tokens)
    return (
        f"{args.method_name}: {name_of(pair.student)} ({size} parameters) learns{learns_from}: "
        f"{counted(steps, 'step')} x {counted(rows, 'sequence')} ({writes}) of up to {args.max_new_tokens} response tokens, "
        f"at most {most} tokens, from {counted(count, 'row')}"
    )
