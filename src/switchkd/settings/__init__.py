"""What a setting may be: typed values, parts that are chosen by name, and the numbers of the paper."""
