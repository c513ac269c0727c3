"""Rollout engines: prompts and a policy in, finished rollouts out."""
