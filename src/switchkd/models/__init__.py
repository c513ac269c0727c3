"""The pair of student and teacher: loading, checking, saving, and what turns hidden states into logits."""
