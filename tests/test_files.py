"""Laws of atomic writing: the old content or the new one, and one clear line."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kompakt.errors import InputError
from kompakt.files import atomic_path, atomic_write, writable_folder


def write_half(path: Path, error: Exception) -> None:
    """Fail with ``error`` after a part of ``path`` was written."""
    with atomic_path(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_bytes(b"part")
        raise error


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(path, RuntimeError("half way"))
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    atomic_write(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize(
    "raised", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, raised: Exception) -> None:
    with pytest.raises(InputError, match="disk is full"):
        write_half(tmp_path / "file.bin", raised)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_recognised_behind_a_librarys_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # torch.save
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_half(tmp_path / "file.bin", error)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(InputError, match="disk is full"):
        write_half(tmp_path / "file.bin", error)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="in the way"):
            writable_folder(path)
    with pytest.raises(InputError, match="does not exist"):
        atomic_write(tmp_path / "none" / "file", b"")
    with pytest.raises(InputError, match="is a folder"):
        atomic_write(tmp_path, b"")
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for method in ("touch", "write_bytes"):
        monkeypatch.setattr(Path, method, refuse)
    expected = "disk is full" if number == errno.ENOSPC else rf"cannot be written \({os.strerror(number)}\)"
    for attempt in (lambda: writable_folder(tmp_path), lambda: atomic_write(tmp_path / "file", b"")):
        with pytest.raises(InputError, match=expected):
            attempt()
