"""Compiled engines: what has to be built for the TensorFlow that is installed here."""
