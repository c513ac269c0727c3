"""Slow float64 definitions that the package is compared with. Nothing here imports the package."""
