"""A fuzz target for the ``.kpk`` reader: python -m tests.fuzz.fuzz_kpk [seconds] [corpus folder].

With atheris (``pip install atheris``) it is guided by coverage; without it, it says so and mutates the
corpus blindly for the same time. Whatever the bytes, only ``KompaktError`` may be raised, and what is
decoded is bounded by ``max_bytes``.
"""

import importlib.util
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 2**24


def one_input(data: bytes) -> None:
    """Read bytes as a file, as a file whose header and checksum are mended, and as coded integers."""
    # Imported here, so that atheris sees the modules load and instruments these alone.
    from kompakt.artifact.container import Reader
    from kompakt.coding import decode_integers
    from kompakt.errors import KompaktError

    for candidate in (data, mended(data)):
        with suppress(KompaktError), Reader(candidate, max_bytes=MOST_BYTES) as reader:
            for name in reader.records:
                reader.tensor(name)
    with suppress(KompaktError):
        decode_integers(data, max_values=MOST_BYTES)


def mended(data: bytes) -> bytes:
    """The bytes under a header that fits them: the two bytes before the index say how long it is, stored."""
    from kompakt.artifact.index import HEADER_BYTES, write_header

    if len(data) < HEADER_BYTES + 4:
        return data
    size = 1 + int.from_bytes(data[HEADER_BYTES : HEADER_BYTES + 2], "little") % (len(data) - HEADER_BYTES - 2)
    offset = len(data) - size
    index = b"\0" + data[offset + 1 :]
    return write_header(offset, index, len(index) - 1) + data[HEADER_BYTES:offset] + index


def blind(seconds: float, folder: Path, seed: int = 0) -> int:
    """Mutate the corpus at random for a while; return how many inputs were tried."""
    rng = random.Random(seed)
    seeds = [path.read_bytes() for path in sorted(folder.iterdir())]
    end, tried = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        one_input(bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.2 else data))
        tried += 1
    return tried


def main(arguments: list[str]) -> None:
    """Fuzz for the seconds that are given (60)."""
    seconds = float(arguments[0]) if arguments else 60.0
    folder = Path(arguments[1]) if len(arguments) > 1 else CORPUS
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install atheris): the corpus is mutated blindly")
        print(f"{blind(seconds, folder)} inputs, no failure")
        return
    import atheris

    with atheris.instrument_imports(include=["kompakt"]):
        one_input(b"")
    # What is found goes to the first folder; the committed corpus stays as it is.
    with tempfile.TemporaryDirectory() as found:
        options = [f"-max_total_time={int(seconds)}", "-max_len=4096", f"-artifact_prefix={tempfile.gettempdir()}/"]
        atheris.Setup([sys.argv[0], found, str(folder), *options], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
