"""Faults seen in other systems, kept as wrong implementations: a check that lets one of them pass is not a check."""
