"""Student and teacher: loading them, checking that they fit, and their heads, which turn hidden states into logits."""
