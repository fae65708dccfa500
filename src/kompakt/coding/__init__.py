"""Integers to bytes and back; knows nothing of torch."""
