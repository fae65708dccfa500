"""Bytes that ship: the container and one file for each target."""
