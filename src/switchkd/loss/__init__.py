"""The training loss, from hidden states and what the teacher said to one number and its gradient."""
