"""What a run takes on a cluster, computed before it is paid for: memory by part, and time by a stated model of cost."""
