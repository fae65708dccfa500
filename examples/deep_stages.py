"""The stages of Deep Compression and what each counts: Han, Mao, Dally 2016 (arXiv 1510.00149)."""

import numpy as np
import torch
from torch import Tensor, nn

from kompakt.coding import huffman
from kompakt.numerics.codebook import share
from kompakt.numerics.masks import keep_largest

DENSITY = {
    "lenet300": {"fc1.weight": 0.08, "fc2.weight": 0.09, "fc3.weight": 0.26},
    "lenet5": {"conv1.weight": 0.66, "conv2.weight": 0.12, "fc1.weight": 0.08, "fc2.weight": 0.19},
}
"""The weights that stay, tables 2 and 3."""
INDEX_BITS = {"conv": 8, "fc": 5}
WEIGHT_BITS = {"lenet300": {"fc": 6}, "lenet5": {"conv": 8, "fc": 5}}
PAPER = {
    "lenet300": {"float": 1070, "ratios": (12, 32, 40), "errors": (1.64, 1.58), "modern": 100},
    "lenet5": {"float": 1720, "ratios": (12, 33, 39), "errors": (0.80, 0.74), "modern": 200},
}
"""Kilobytes, times smaller after each stage, errors in per cent before and after, what the modern way is to reach."""


def cut(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return masks that keep the largest weights of each layer, as many as the paper."""
    tensors = dict(model.named_parameters())
    return {layer: keep_largest(tensors[layer].detach().abs(), 1 - kept) for layer, kept in DENSITY[name].items()}


def clustered(model: nn.Module, name: str) -> dict[str, tuple[Tensor, int]]:
    """Cluster the nonzero weights of each layer by k-means from linear starts, §3.

    Returns:
        By layer: indices, int64, the shape of the weight, 0 for zeros; bits of an index that shares its code with zero.
    """
    found, tensors = {}, dict(model.named_parameters())
    for layer in DENSITY[name]:
        bits = _of(layer, WEIGHT_BITS[name])
        indices, book = share(tensors[layer].detach(), bits, start="linear", keep_zeros=True)
        indices, zero = indices.long(), int((book[0] == 0).nonzero()[0])
        # Zero comes first, the others keep their order.
        found[layer] = (torch.where(indices == zero, 0, indices + (indices < zero)), bits)
    return found


def sizes(model: nn.Module, bits: dict[str, int]) -> dict[str, int]:
    """Count bytes after each stage: gaps between nonzeros, their values or indices, codebooks, biases as float32.

    A gap too wide for its bits takes a filler, a zero that is stored, as in the paper's figure 2.
    """
    total = dict.fromkeys(("prune", "share", "huffman"), 0.0)
    for name, weight in model.named_parameters():
        if name not in bits:
            total = {stage: size + 32 * weight.numel() for stage, size in total.items()}
            continue
        gaps, indices, values = relative(weight.detach().numpy().reshape(-1), _of(name, INDEX_BITS))
        width = _of(name, INDEX_BITS)
        total["prune"] += gaps.size * (width + 32)
        total["share"] += gaps.size * (width + bits[name]) + 32 * values
        total["huffman"] += coded_bits(gaps) + coded_bits(indices) + 32 * values
    return {stage: round(size / 8) for stage, size in total.items()}


def relative(flat: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return gaps between stored weights, the index of each one's value (0 for fillers), and the number of values."""
    places = np.flatnonzero(flat)
    values, index = np.unique(flat[places], return_inverse=True)
    before = np.diff(places, prepend=-1) - 1
    most = 2**width - 1
    fillers = before // (most + 1)
    gaps = np.full(places.size + int(fillers.sum()), most, np.int64)
    indices = np.zeros(gaps.size, np.int64)
    ends = np.cumsum(fillers + 1) - 1
    gaps[ends], indices[ends] = before - fillers * (most + 1), index + 1
    return gaps, indices, values.size


def coded_bits(symbols: np.ndarray) -> int:
    """Return the bits of symbols under their canonical Huffman code, its code lengths (4 bits each) included."""
    counts = np.bincount(symbols)
    if np.count_nonzero(counts) < 2:
        return 4 * counts.size
    lengths = huffman.code_lengths(counts)
    assert np.array_equal(huffman.decode(huffman.encode(symbols, lengths), lengths, symbols.size), symbols)
    return 8 * len(huffman.encode(symbols, lengths)) + 4 * counts.size


def _of(layer: str, table: dict[str, int]) -> int:
    return table["conv" if layer.startswith("conv") and "conv" in table else "fc"]
