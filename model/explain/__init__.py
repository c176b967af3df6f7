"""Seeing what the model does: attention, logit lens, ablations, on the weights that serve."""
