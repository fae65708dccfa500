"""A teacher's answers on disk, memory-mapped, for data that come again unchanged."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kompakt.build.taps import inference
from kompakt.errors import FormatError, InputError
from kompakt.files import atomic_write, writable_folder

DIGEST_BYTES = 16
TAKEN = (errno.EAGAIN, errno.EACCES)
"""What a lock says that another process holds."""


class TeacherCache:
    """A callable in a teacher's place: it asks the teacher once for every distinct image.

    Images are known by a digest of their values, so that order, batches and epochs do not matter:
    where augmentation is fixed (none, flips, or the same seeds in a second run), every image that was
    seen before is answered from ``outputs.npy``. With random augmentation nothing repeats and nothing is
    gained; once ``capacity`` images are held, new ones are answered without being kept.

    An answer may differ in its last bits from what the teacher says in a batch of another size.

    Args:
        teacher: a module, or a callable from a batch to logits (N, K).
        folder: made where it is missing; every process that is at work keeps a part of its own.
        capacity: the most images that are held; the files' size is capacity · (16 + 4 K) bytes.
        identity: a name for a teacher that is not a module; a module is known by its weights.

    Raises:
        InputError: the folder holds another teacher's answers, or another capacity's.
        FormatError: the folder's files are damaged.
    """

    def __init__(self, teacher: Callable[[Tensor], Any], folder: str | Path, *, capacity: int, identity: str = ""):
        if capacity < 1:
            raise InputError(f"capacity {capacity}: expected the number of images to hold, 1 or more")
        if not identity and not isinstance(teacher, nn.Module):
            raise InputError("a teacher that is not a module needs an identity, such as its file's digest")
        self.teacher, self.capacity = teacher, capacity
        self.folder = _part(Path(folder))
        self.identity = identity or weights_digest(teacher)  # type: ignore[arg-type]
        self.asked = self.answered = 0
        self.rows: dict[bytes, int] = {}
        self.keys: np.ndarray | None = None
        self.outputs: np.ndarray | None = None
        if (self.folder / "cache.json").exists():
            self._open()

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the teacher's logits for a batch, shape (N, K), float32, on the CPU."""
        images = inputs.detach().cpu().contiguous().numpy()
        digests = [blake2b(image.tobytes(), digest_size=DIGEST_BYTES).digest() for image in images]
        missing = [i for i, digest in enumerate(digests) if digest not in self.rows]
        self.asked, self.answered = self.asked + len(missing), self.answered + len(digests) - len(missing)
        fresh = self._ask(inputs[missing]) if missing else None
        if fresh is not None and self.outputs is None:
            self._create(fresh.shape[1])
        assert self.outputs is not None
        result = np.empty((len(digests), self.outputs.shape[1]), dtype=np.float32)
        for row, i in enumerate(missing):
            result[i] = fresh[row]  # type: ignore[index]
            self._keep(digests[i], result[i])
        for i in sorted(set(range(len(digests))) - set(missing)):
            result[i] = self.outputs[self.rows[digests[i]]]
        return torch.from_numpy(result)

    def _ask(self, inputs: Tensor) -> np.ndarray:
        if isinstance(self.teacher, nn.Module):
            with inference(self.teacher):
                output = self.teacher(inputs)
        else:
            output = self.teacher(inputs)
        return torch.as_tensor(output).float().cpu().numpy()

    def _keep(self, digest: bytes, output: np.ndarray) -> None:
        if digest in self.rows or len(self.rows) >= self.capacity:
            return
        row = len(self.rows)
        # The key last: a process that is killed in between leaves a row that counts as empty.
        self.outputs[row] = output  # type: ignore[index]
        self.keys[row] = np.frombuffer(digest, dtype=np.uint8)  # type: ignore[index]
        self.rows[digest] = row

    def _create(self, classes: int) -> None:
        self._map("w+", classes)
        facts = {"identity": self.identity, "capacity": self.capacity, "classes": classes}
        atomic_write(self.folder / "cache.json", json.dumps(facts).encode())

    def _open(self) -> None:
        path = self.folder / "cache.json"
        try:
            facts = json.loads(path.read_bytes())
            classes, found = int(facts["classes"]), (facts["identity"], facts["capacity"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: not a teacher's cache; delete the folder to start anew") from error
        if found != (self.identity, self.capacity):
            raise InputError(f"{self.folder}: holds the answers of another teacher or capacity; take another folder")
        self._map("r+", classes)
        filled = int(np.count_nonzero(self.keys.any(axis=1)))  # type: ignore[union-attr]
        self.rows = {self.keys[row].tobytes(): row for row in range(filled)}  # type: ignore[index]

    def _map(self, mode: Any, classes: int) -> None:
        shapes = {"keys": ((self.capacity, DIGEST_BYTES), np.uint8), "outputs": ((self.capacity, classes), np.float32)}
        for name, (shape, dtype) in shapes.items():
            path = self.folder / f"{name}.npy"
            try:
                if mode == "r+":
                    np.lib.format.open_memmap(path, mode="r")  # r+ would lengthen a file that is too short
                mapped = np.lib.format.open_memmap(path, mode=mode, shape=shape, dtype=dtype)
            except (ValueError, OSError) as error:
                raise FormatError(f"{path}: not a readable array; delete {self.folder} to start anew") from error
            if mapped.shape != shape or mapped.dtype != dtype:
                raise FormatError(f"{path}: shape {mapped.shape}, expected {shape}; delete {self.folder} to start anew")
            setattr(self, name, mapped)


def _part(folder: Path) -> Path:
    """Take the first part that no other process writes to.

    The lock is the process's, however many caches it opens, and is never closed: closing any handle would let go of it.
    """
    rank = f"part-{os.environ.get('RANK', '0')}"
    for number in count():
        part = writable_folder(folder / (f"{rank}.{number}" if number else rank))
        handle = os.open(part / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in TAKEN:
                raise InputError(
                    f"{part}: cannot be locked ({error.strerror}); take a folder on a local disk"
                ) from error
        else:
            return part
    raise AssertionError


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a module's parameters and buffers: the same for the same weights."""
    state = blake2b(digest_size=DIGEST_BYTES)
    for name, value in model.state_dict().items():
        state.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
