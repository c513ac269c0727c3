"""Rollouts by a serving engine: the acceptance rule, what crosses the wire, and vLLM on both of its sides."""
