"""Device and precision of a run: our settings, and those of transformers and accelerate for the same thing."""

from __future__ import annotations

import os
from typing import Any

from switchkd.errors import UserError
from switchkd.models.placement import Placement, placement_of, precision_named


def placement_for(args: Any) -> Placement:
    """Where a run with the settings of a `SwitchConfig` computes and in what. Raises UserError where two of them contradict."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.fp16 or launched == "fp16":
        raise UserError("fp16 is asked for, in which the loss's gradients underflow; take precision bf16 or float32")
    precision, bf16 = precision_named(args.precision), True if launched == "bf16" else args.bf16
    if bf16 is not None:
        named = "bf16" if bf16 else "float32"
        if precision not in ("auto", named):
            raise UserError(f"precision is {args.precision!r}, but bf16 is {bf16}; set one of them")
        precision = precision_named(named)
    return placement_of(
        device="cpu" if args.use_cpu else "auto",
        precision=precision,
        dtype=args.dtype,
        teacher_dtype=args.teacher_dtype,
        attn_implementation=args.attn_implementation,
        model_init_kwargs=args.model_init_kwargs,
        teacher_model_init_kwargs=args.teacher_model_init_kwargs,
    )
