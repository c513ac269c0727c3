"""What is measured of a pair before it is trained: the threshold for a teacher share, and whether the teacher misguides."""
