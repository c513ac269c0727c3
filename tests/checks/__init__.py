"""What an implementation has to satisfy, as functions that take it: ours pass, and the planted faults must not."""
