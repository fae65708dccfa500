"""Integers to bytes and back: bit packing, Huffman and range coding. Knows nothing of torch."""

from kompakt.coding.integers import decode_integers, encode_integers, estimate_bits, rate_table
from kompakt.coding.rate import RateModel, rate_model

__all__ = ["RateModel", "decode_integers", "encode_integers", "estimate_bits", "rate_model", "rate_table"]
