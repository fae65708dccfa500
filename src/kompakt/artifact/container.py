"""Writing and reading ``.kpk`` files: named tensors, coded block by block, found again at random.

FORMAT.md is the specification. A writer holds one block, a reader one decoded block: memory does not
grow with the file.

    >>> import numpy as np, tempfile, pathlib
    >>> from kompakt.artifact.container import Reader, create
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "m.kpk"
    >>> with create(path) as writer:
    ...     writer.dense("weight", np.eye(3, dtype=np.float32))
    >>> with Reader(path) as reader:
    ...     float(reader.tensor("weight").sum())
    3.0
"""

from kompakt.artifact.reader import Reader
from kompakt.artifact.records import Part, Record
from kompakt.artifact.writer import Writer, create

__all__ = ["Part", "Reader", "Record", "Writer", "create"]
