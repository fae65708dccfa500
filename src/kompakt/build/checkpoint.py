"""Checkpoints of a training run: one file, written atomically, read without running pickled code."""

from pathlib import Path
from typing import Any

import torch

from kompakt.errors import FormatError, InputError
from kompakt.files import atomic_path, writable_folder

VERSION = 1
FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], identity: dict[str, Any]) -> Path:
    """Write ``state`` to ``folder``, replacing the checkpoint there only once the new one is complete.

    Args:
        folder: made where it is missing.
        state: tensors, numbers, strings, lists, tuples and dicts.
        identity: what tells this run from others: compared by ``load_checkpoint``.
    """
    path = writable_folder(folder) / FILE
    with atomic_path(path) as temporary:
        torch.save({"version": VERSION, "identity": identity, **state}, temporary)
    return path


def load_checkpoint(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint in ``folder``, or return None where there is none.

    Raises:
        FormatError: the file is not a checkpoint of this version.
        InputError: it belongs to another run; the message names what differs.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise FormatError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to start anew"
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION or not isinstance(state.get("identity"), dict):
        raise FormatError(f"{path}: not a checkpoint of version {VERSION}; delete it to start anew")
    for name, value in identity.items():
        if (found := state["identity"].get(name)) != value:
            raise InputError(
                f"{path}: belongs to another run ({name} was {found}, is {value}); "
                "take another checkpoint folder, or delete it"
            )
    return state
