"""What the trainer is made of: the text of a step, teachers that cost less, what is measured and kept."""
