"""Writing files so that a reader sees the old content or the new one, never half of it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from kompakt.errors import InputError, KompaktError

LEAST_BYTES = 2**16
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG})


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well.

    The caller creates the file; it is flushed to the disk and renamed over ``path``. If the block
    raises, the temporary file is removed and ``path`` is as it was. The suffix is kept, for writers
    that look at it.

    Raises:
        InputError: the folder is missing or may not be written, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    temporary = path.with_name(f".{path.stem[:64]}.{token_hex(6)}.tmp{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except KompaktError:
        raise
    except Exception as error:
        line = _explain(path, error)
        if line is None:
            raise
        raise InputError(line) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step: temporary name, flush to the disk, rename.

    Raises:
        InputError: the folder is missing or may not be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def writable_folder(path: str | Path) -> Path:
    """Make the folder ``path`` if it is missing, and check that files can be created in it.

    Raises:
        InputError: it cannot be made or written, or ``path`` is a file.
    """
    folder = Path(path)
    probe = folder / f".{token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: a file is in the way, expected a folder; choose another name") from error
    except OSError as error:
        raise InputError(_explain(folder, error) or f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        # A probe that was never made may sit on a path that cannot even be looked up.
        if folder.is_dir() and os.access(folder, os.W_OK):
            probe.unlink(missing_ok=True)
    return folder


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its rename is journalled.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(path: Path, error: Exception) -> str | None:
    """The line for a write that the system refused, or None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    # Libraries hide the number: some keep the text of the system, torch.save keeps neither.
    if number in FULL or "No space left on device" in str(error) or _is_full(path.parent):
        return f"{path}: the disk is full, nothing was written; free some space or choose another folder"
    if isinstance(error, OSError) and number in REFUSED:
        return f"{path}: cannot be written ({error.strerror}); choose another folder or mend its permissions"
    return None


def _is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no room for one more small file."""
    return folder.is_dir() and shutil.disk_usage(folder).free < LEAST_BYTES
