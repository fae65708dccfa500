"""Bits a weight of quantized networks, losslessly coded: python -m benchmarks.coding [--networks resnet20 …].

Weights of ../shared/zoo, rounded per channel to 8 … 3 bits, are coded by kompakt, by Huffman's code (one
table a tensor), by zlib, xz and, where they are installed, zstd (``zstandard``) and NNCodec's CABAC (``nncodec``).
All tables and side information are counted; scales only in the column of whole ``.kpk`` files, which has everything.
Times are processor seconds of the fastest of several runs, one thread; decoding ends at integer tensors.
"""

import argparse
import importlib.util
import io
import json
import lzma
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from kompakt.artifact.container import Reader, Writer
from kompakt.coding import huffman
from kompakt.coding.block import encode_block
from kompakt.coding.options import Integers
from kompakt.coding.section import compiled_loops
from kompakt.coding.unblock import Spec, decode_block
from kompakt.spec import PerChannel, QuantSpec

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
RESULTS = ROOT / "benchmarks" / "results" / "coding.json"
BLOCK_VALUES = 2**21
Tensors = list[np.ndarray]


def quantized(network: str, bits: int) -> Tensors:
    """The weights of convolutions and linear layers, rounded to the symmetric grid of each channel."""
    found = []
    for weight in load_file(ZOO / f"{network}-cifar10.safetensors").values():
        if weight.ndim >= 2:
            wide = (-1,) + (1,) * (weight.ndim - 1)
            scale = np.abs(weight).reshape(len(weight), -1).max(axis=1).reshape(wide) / (2 ** (bits - 1) - 1)
            found.append(np.rint(weight / np.where(scale > 0, scale, 1)).astype(np.int8))
    return found


def entropy_bits(tensors: Tensors) -> float:
    """Bits under each tensor's own histogram, tables not counted."""
    total = 0.0
    for tensor in tensors:
        share = np.unique(tensor, return_counts=True)[1] / tensor.size
        total -= tensor.size * float((share * np.log2(share)).sum())
    return total


def blocks_of(tensors: Tensors) -> list[Tensors]:
    """Tensors in blocks of two million values, large ones cut, as the container does it."""
    blocks: list[Tensors] = [[]]
    for tensor in tensors:
        for part in np.array_split(tensor, -(-tensor.size // BLOCK_VALUES)):
            if sum(found.size for found in blocks[-1]) >= BLOCK_VALUES:
                blocks.append([])
            blocks[-1].append(part)
    return blocks


def kompakt_coder(tensors: Tensors) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], Tensors]]:
    """Encoder and decoder of kompakt's blocks."""
    blocks = blocks_of(tensors)

    def encode() -> list[bytes]:
        return [encode_block([Integers(values=tensor, family="int8") for tensor in block]) for block in blocks]

    def decode(data: list[bytes]) -> Tensors:
        specs = [[Spec(tensor.shape, tensor.dtype) for tensor in block] for block in blocks]
        return [found for raw, wanted in zip(data, specs, strict=True) for found in decode_block(raw, wanted)]

    return encode, decode


def file_coder(tensors: Tensors) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], Tensors]]:
    """A whole ``.kpk`` file with the scales of the channels, opened and read."""

    def encode() -> list[bytes]:
        file = io.BytesIO()
        writer = Writer(file)
        for number, tensor in enumerate(tensors):
            scale = np.random.default_rng(number).uniform(0.001, 0.1, len(tensor)).astype(np.float32)
            writer.uniform(f"layer{number}.weight", tensor, scale, QuantSpec(granularity=PerChannel()))
        writer.close()
        return [file.getvalue()]

    def decode(data: list[bytes]) -> Tensors:
        with Reader(data[0]) as reader:
            return [reader.parts(name)["codes"] for name in reader.records]

    return encode, decode


def huffman_coder(tensors: Tensors) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], Tensors]]:
    """Encoder and decoder of one canonical code a tensor; four bits a symbol for its lengths."""
    counts = [np.bincount(tensor.reshape(-1).astype(int) + 128, minlength=256) for tensor in tensors]
    lengths = [huffman.code_lengths(count) for count in counts]
    spans = [np.ptp(np.flatnonzero(count)) + 1 for count in counts]

    def encode() -> list[bytes]:
        pairs = zip(tensors, lengths, spans, strict=True)
        return [huffman.encode(t.reshape(-1).astype(int) + 128, n) + bytes(s // 2 + 3) for t, n, s in pairs]

    def decode(data: list[bytes]) -> Tensors:
        found = []
        for raw, tensor, length, span in zip(data, tensors, lengths, spans, strict=True):
            symbols = huffman.decode(raw[: len(raw) - span // 2 - 3], length, tensor.size)
            found.append((symbols.astype(np.int16) - 128).astype(np.int8).reshape(tensor.shape))
        return found

    return encode, decode


def byte_coder(compress: Callable[[bytes], bytes], inflate: Callable[[bytes], bytes]):
    """A coder of bytes, for ``measure``."""

    def coder(tensors: Tensors) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], Tensors]]:
        def encode() -> list[bytes]:
            return [compress(b"".join(tensor.tobytes() for tensor in tensors))]

        def decode(data: list[bytes]) -> Tensors:
            flat = np.frombuffer(inflate(data[0]), np.int8)
            ends = np.cumsum([0, *(tensor.size for tensor in tensors)])
            return [flat[a : a + t.size].reshape(t.shape) for a, t in zip(ends, tensors, strict=False)]

        return encode, decode

    return coder


def nncodec_coder(tensors: Tensors) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], Tensors]]:
    """NNCodec's CABAC on the same integers, with its own search of the contexts' start."""
    from nncodec.extensions import deepCABAC

    off = (deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8))

    def encode() -> list[bytes]:
        found = []
        for tensor in tensors:
            encoder = deepCABAC.Encoder()
            encoder.initCtxModels(11, 1)
            rows = np.zeros(len(tensor), np.int32)
            encoder.encodeLayer(np.ascontiguousarray(tensor, np.int32), 0, 0, 0, 0, 0, rows, *off, 0, 0)
            found.append(bytes(encoder.finish()))
        return found

    def decode(data: list[bytes]) -> Tensors:
        found = []
        for raw, tensor in zip(data, tensors, strict=True):
            decoder, out = deepCABAC.Decoder(), np.zeros(tensor.shape, np.int32)
            decoder.setStream(np.frombuffer(raw, np.uint8))
            decoder.initCtxModels(11)
            decoder.decodeLayer(out, 0, 0, 0, 0, *off, 0, 0)
            found.append(out)
        return found

    return encode, decode


def coders() -> dict[str, Callable]:
    """The coders that are installed."""
    found = {
        "kompakt": kompakt_coder,
        ".kpk file": file_coder,
        "Huffman": huffman_coder,
        "zlib-9": byte_coder(lambda raw: zlib.compress(raw, 9), zlib.decompress),
        "xz-9": byte_coder(lambda raw: lzma.compress(raw, preset=9), lzma.decompress),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd-19"] = byte_coder(
            lambda raw: zstandard.ZstdCompressor(level=19).compress(raw), zstandard.ZstdDecompressor().decompress
        )
    if importlib.util.find_spec("nncodec"):
        found["NNCodec"] = nncodec_coder
    return found


def measure(coder: Callable, tensors: Tensors, runs: int) -> dict[str, float]:
    """Bits a weight, and nanoseconds a weight to encode and decode."""
    encode, decode = coder(tensors)
    count = sum(tensor.size for tensor in tensors)
    start = time.process_time()
    data = encode()
    encoding, decoding = time.process_time() - start, float("inf")
    for _ in range(runs):
        start = time.process_time()
        found = decode(data)
        decoding = min(decoding, time.process_time() - start)
    flat = np.concatenate([array.reshape(-1) for array in found])
    if not np.array_equal(flat, np.concatenate([tensor.reshape(-1) for tensor in tensors])):
        raise SystemExit("a coder did not return what it was given")
    bits = 8 * sum(map(len, data)) / count
    return {"bits": bits, "encode_ns": encoding / count * 1e9, "decode_ns": decoding / count * 1e9}


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet32", "resnet18"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5, 4, 3])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    chosen, rows = coders(), []
    print("| network | bits | entropy | " + " | ".join(f"{name}: b/w, enc, dec ns" for name in chosen) + " |")
    print("| --- " * (3 + len(chosen)) + "|")
    for network in arguments.networks:
        for bits in arguments.bits:
            tensors = quantized(network, bits)
            count = sum(tensor.size for tensor in tensors)
            row = {"network": network, "bits": bits, "weights": count, "entropy": entropy_bits(tensors) / count}
            row["compiled"] = compiled_loops() is not None
            row |= {name: measure(coder, tensors, arguments.runs) for name, coder in chosen.items()}
            cells = [f"{row[n]['bits']:.3f}, {row[n]['encode_ns']:.0f}, {row[n]['decode_ns']:.0f}" for n in chosen]
            print(f"| {network} | {bits} | {row['entropy']:.3f} | " + " | ".join(cells) + " |", flush=True)
            rows.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
