"""The training loss: hidden states and what the teacher said in, one number and its gradient out."""
