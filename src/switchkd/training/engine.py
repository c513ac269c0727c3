"""The engine that a run writes its text with."""

from __future__ import annotations

from collections.abc import Mapping

from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.rollout.by_teacher import EngineByTeacher
from switchkd.rollout.engine import Engine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.serving.engine import vllm_engine
from switchkd.training.machine import compile_of
from switchkd.training.taught import Taught, first_pair, named


def engine_of(taught: Mapping[str, Taught], args: SwitchConfig, *, in_parts: bool) -> Engine:
    """vLLM where the run names it, or else our own; `in_parts`: the weights are spread over processes."""
    if named(taught):
        pairs = {name: each.pair for name, each in taught.items()}
        return EngineByTeacher(pairs, lambda pair: _engine_of_pair(pair, args, in_parts=in_parts))
    return _engine_of_pair(first_pair(taught), args, in_parts=in_parts)


def _engine_of_pair(pair: ModelPair, args: SwitchConfig, *, in_parts: bool) -> Engine:
    margin = args.plan.objective.margin_top_k
    if args.vllm:
        return vllm_engine(pair, args.vllm, margin_top_k=margin)
    compile = compile_of(pair, args, in_parts=in_parts)
    return SpeculativeEngine(pair, args.block_size, max_rows=args.rollout_rows, margin_top_k=margin, compile=compile)
