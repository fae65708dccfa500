"""Weights on disk: safetensors and ``torch.save`` checkpoints, read without running any code."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from kompakt.errors import FormatError, InputError, ModelError
from kompakt.files import atomic_write

NESTS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
SHOWN = 3


def load_weights(model: nn.Module, path: str | Path, *, name: str = "the model") -> nn.Module:
    """Load ``path`` into ``model``, in place; every tensor must find its place.

    Nested dicts (``state_dict``, ``model_state_dict``, ``model``, ``net``) and the prefixes that
    wrappers leave (``module.``, ``_orig_mod.``) are seen through.

    Args:
        model: the module; shared tensors need to be in the file once.
        path: a safetensors file or a checkpoint of ``torch.save``.
        name: what to call the model in messages.

    Raises:
        InputError: the file is missing, needs code to be read, or its tensors do not fit.
        FormatError: the file is truncated or of another kind.
    """
    own = model.state_dict(keep_vars=True)
    found = _without_prefixes(read_weights(path), own)
    found |= {key: found[first] for key, first in _aliases(own).items() if key not in found and first in found}
    # A counter that evaluation never reads; old checkpoints lack it.
    found = {key: own[key].detach() for key in own if key.endswith("num_batches_tracked")} | found
    line = _mismatch(found, own)
    if line:
        raise InputError(f"{path}: does not fit {name}: {line}")
    model.load_state_dict(found)
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a ``torch.save`` checkpoint, by name, on the CPU.

    Nothing is unpickled that needs code (``weights_only=True``).

    Raises:
        InputError: the file is missing, cannot be opened, or needs code to be read.
        FormatError: the file is truncated, or holds no tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such weights file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, expected a .safetensors or .pt file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise FormatError(f"{path}: the file is empty")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_checkpoint(path)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the model's state as safetensors, in one step; the same state gives the same bytes.

    A tensor that has several names is written once; the others are recorded in the metadata as
    ``other name → name in the file``, the convention of ``safetensors.torch.save_model``.

    Raises:
        ModelError: the state holds something that is not a tensor.
        InputError: the file cannot be written.
    """
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{name}: is a {type(value).__name__}; only tensors can be saved as safetensors")
    aliases = _aliases(state)
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if name not in aliases
    }
    atomic_write(path, _ordered(to_safetensors(tensors, metadata={"format": "pt"} | aliases)))


def check_finite(model: nn.Module, *, where: str) -> None:
    """Check that no parameter or running statistic is NaN or infinite, and no buffer NaN.

    Buffers may be infinite: attention masks are.

    Raises:
        ModelError: one is; the message names it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        strict = isinstance(tensor, nn.Parameter) or name.rsplit(".", 1)[-1].startswith("running_")
        bad = ~torch.isfinite(tensor) if strict else torch.isnan(tensor)
        if bad.any():
            raise ModelError(f"{where}: {name} has {int(bad.sum())} values of {bad.numel()} that are NaN or infinite")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, with the other names of shared tensors restored."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    return found | {other: found[name] for other, name in metadata.items() if name in found and other not in found}


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a ``torch.save`` checkpoint and take the innermost dict of tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    for _ in range(SHOWN):
        nested = [
            content[key] for key in NESTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        if not nested:
            break
        content = nested[0]
    if not isinstance(content, Mapping):
        raise FormatError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(content)[:SHOWN]) or "nothing"
        raise FormatError(f"{path}: no tensors found (it holds {keys}); save model.state_dict()")
    return tensors


def _opened(content: object) -> object:
    """The dict of weights inside a training checkpoint, or the content itself."""
    if isinstance(content, Mapping):
        for key in NESTS:
            if isinstance(content.get(key), Mapping):
                return content[key]
    return content


def _unreadable(path: Path, error: Exception) -> FormatError | InputError:
    """The error for a checkpoint that ``torch.load`` refused."""
    text = " ".join(str(error).split())
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    convert = 'convert it where it was made: torch.save(model.state_dict(), "weights.pt")'
    if wanted:
        return InputError(f"{path}: needs {wanted[1]} to be read, and kompakt runs no code from files; {convert}")
    if "TorchScript" in text:
        return InputError(f"{path}: is a TorchScript program, not weights; {convert}")
    if "weights_only" in text.lower() or "WeightsUnpickler" in text:
        return InputError(f"{path}: cannot be read without running code; {convert}")
    return FormatError(f"{path}: truncated or not a checkpoint ({type(error).__name__}: {text[:120]}); copy it again")


def _without_prefixes(found: dict[str, Tensor], own: Mapping[str, object]) -> dict[str, Tensor]:
    """Take off the prefixes that wrappers put before every name and the model itself does not have."""
    if not any("_orig_mod." in key for key in own):
        found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in found) and not any(key.startswith(prefix) for key in own):
                found = {key.removeprefix(prefix): value for key, value in found.items()}
                changed = True
    return found


def _aliases(state: Mapping[str, object]) -> dict[str, str]:
    """Other names of shared tensors → the first name of each."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def _mismatch(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say in one line how the names and shapes of a file differ from the model's; empty if they do not."""
    missing = [key for key in own if key not in found]
    unexpected = [key for key in found if key not in own]
    other = [key for key in own if key in found and _size(found[key]) != _size(own[key])]
    sizes = [f"{key} is {_size(found[key])} in the file and {_size(own[key])} in the model" for key in other]
    parts = [_some(len(missing), "missing", missing), _some(len(unexpected), "unexpected", unexpected)]
    parts.append(_some(len(other), "of another size", sizes))
    # Only the first dimension of a few tensors differs, and alike: a classifier for other classes.
    classes = {tuple(found[key].shape[:1]) for key in other}
    last = all(found[key].shape[1:] == own[key].shape[1:] for key in other)
    hint = (
        f"; try --model-arg num_classes={found[other[0]].shape[0]}"
        if last and len(classes) == 1 and any(classes)
        else ""
    )
    return ", ".join(part for part in parts if part) + hint


def _some(count: int, kind: str, names: list[str]) -> str:
    """A count with the first few names; empty for none."""
    more = ", …" if count > SHOWN else ""
    return f"{count} {kind} ({', '.join(names[:SHOWN])}{more})" if count else ""


def _size(tensor: Tensor) -> str:
    """A shape for a person, ``64×3×7×7``; the kind of number is added where it is not a real one."""
    shape = "×".join(str(size) for size in tensor.shape) or "a single value"
    return shape if tensor.is_floating_point() else f"{shape} ({str(tensor.dtype).removeprefix('torch.')})"


def _ordered(data: bytes) -> bytes:
    """Write the metadata of a safetensors file in sorted order; its writer leaves that to chance."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
