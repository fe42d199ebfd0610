"""Gradients and variables: the tape, accumulation over micro-batches, and the transforms."""
