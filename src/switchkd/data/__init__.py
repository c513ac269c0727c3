"""Data sets: from names and files to padded tensors."""
