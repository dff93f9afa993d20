"""Figures of the paper, drawn from what is trained on the spot."""
