"""What would go wrong with a file of OpenVINO's own, read off the ``.xml`` and its ``.bin`` without OpenVINO."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from kompakt.artifact.lint import Finding
from kompakt.errors import FormatError
from kompakt.numerics.grid import saturation_free

_LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_MOVES = frozenset({"MaxPool", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Pad"})
_STEPS = frozenset({"Convert", "Multiply", "Subtract", "Reshape", "Transpose"})
_INTEGERS = {"i8": np.int8, "u8": np.uint8}
_TYPES = frozenset({"f64", "u4", "i4", "nf4", "f4e2m1"})


@dataclass(frozen=True, kw_only=True)
class Ir:
    """A model as OpenVINO stores it: layers by id, and which layer feeds which input."""

    layers: dict[str, ElementTree.Element]
    feeds: dict[tuple[str, str], str]
    weights: bytes


def check_xml(path: Path) -> tuple[Finding, ...]:
    """Check the two files of a model: islands, sums that saturate, types that the CPU does not multiply.

    Raises:
        FormatError: the ``.xml`` or its ``.bin`` is missing, truncated or something else.
    """
    ir = read_ir(path)
    found: list[Finding] = []
    for identity, layer in ir.layers.items():
        kind, name = layer.get("type", ""), layer.get("name", identity)
        stored = _stored(ir, identity) if kind in _LAYERS else None
        if stored is None:
            continue
        if not _quantized(ir, ir.feeds.get((identity, "0"))):
            what = f"{kind}: integer weight, float input: it is dequantized and multiplied in float"
            mend = "quantize its input too: calibrate with data, and do not keep the layer before it in float"
            found.append(Finding(where=name, what=what, mend=mend, rule="island"))
        elif stored.dtype == np.int8:
            rows = torch.from_numpy(stored.reshape(-1, *stored.shape[2:]) if kind == "GroupConvolution" else stored)
            bad = int((~saturation_free(rows.to(torch.int32))).sum())
            if bad:
                what = f"{bad} of {len(rows)} channels can overflow int16 where u8 x s8 pairs are summed without VNNI"
                mend = "export it by kompakt export --to openvino, or quantize it with 7-bit weights"
                found.append(Finding(where=name, what=what, mend=mend, rule="saturation"))
    found += [
        Finding(
            where=layer.get("name", "?"),
            what=f"{kind} constants: OpenVINO's CPU kernels convert them to float",
            mend="store 8-bit integers: kompakt export --to openvino",
            rule="type",
        )
        for layer in ir.layers.values()
        if layer.get("type") == "Const" and (kind := _data(layer).get("element_type", "")) in _TYPES
    ]
    return tuple(found)


def read_ir(path: Path) -> Ir:
    """Read a model's two files.

    Raises:
        FormatError: see ``check_xml``.
    """
    try:
        text = path.read_text()
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise FormatError(f"{path}: declares entities, which no model of OpenVINO's does")
        root = ElementTree.fromstring(text)
        weights = path.with_suffix(".bin").read_bytes()
    except ElementTree.ParseError as error:
        raise FormatError(f"{path}: not a sound OpenVINO model: {error}") from None
    except OSError as error:
        raise FormatError(f"{error.filename or path}: {error.strerror}; keep the .xml and its .bin together") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not a sound OpenVINO model: it is not text") from None
    layers = {layer.get("id", ""): layer for layer in root.iterfind("./layers/layer")}
    if root.tag != "net" or not layers:
        raise FormatError(f"{path}: not an OpenVINO model: it has no layers")
    feeds = {}
    for edge in root.iterfind("./edges/edge"):
        reader, maker, place = (edge.get(key, "") for key in ("to-layer", "from-layer", "to-port"))
        if reader not in layers or maker not in layers:
            raise FormatError(f"{path}: an edge leads from {maker or 'nowhere'} to {reader or 'nowhere'}")
        ports = [port.get("id", "") for port in layers[reader].iterfind("./input/port")]
        if place in ports:
            feeds[reader, str(ports.index(place))] = maker
    ir = Ir(layers=layers, feeds=feeds, weights=weights)
    for layer in layers.values():
        data = _data(layer)
        if layer.get("type") == "Const" and int(data.get("offset", 0)) + int(data.get("size", 0)) > len(weights):
            raise FormatError(f"{path.with_suffix('.bin')}: is shorter than {path.name} says; it was cut off")
    return ir


def _data(layer: ElementTree.Element) -> dict[str, str]:
    found = layer.find("data")
    return {} if found is None else dict(found.attrib)


def _stored(ir: Ir, identity: str) -> np.ndarray | None:
    """Return a layer's weight where it is stored in integers."""
    here = ir.feeds.get((identity, "1"))
    while here is not None and ir.layers[here].get("type") in _STEPS:
        here = ir.feeds.get((here, "0"))
    if here is None or ir.layers[here].get("type") != "Const":
        return None
    data = _data(ir.layers[here])
    kind = _INTEGERS.get(data.get("element_type", ""))
    if kind is None:
        return None
    shape = [int(size) for size in data["shape"].split(",") if size]
    return np.frombuffer(ir.weights, kind, prod(shape), int(data["offset"])).reshape(shape).copy()


def _quantized(ir: Ir, here: str | None) -> bool:
    while here is not None and ir.layers[here].get("type") in _MOVES:
        here = ir.feeds.get((here, "0"))
    return here is not None and ir.layers[here].get("type") == "FakeQuantize"
