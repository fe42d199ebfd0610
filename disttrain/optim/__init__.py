"""Optimizers: preparing and applying, and the loss scale."""
