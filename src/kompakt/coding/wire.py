"""Reading and writing the small numbers of the format: varints, zigzag, fixed fields, checked bounds."""

from kompakt.errors import FormatError

VARINT_BYTES = 9


class Cursor:
    """A place in bytes that only moves forward; every read is checked against the end.

    Args:
        data: the bytes; a ``memoryview`` is not copied.
        where: what is read, for messages.
    """

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self.data = memoryview(data)
        self.where = where
        self.at = 0
        self._end = len(self.data)

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self._end - self.at

    def take(self, count: int) -> memoryview:
        """Return the next ``count`` bytes.

        Raises:
            FormatError: fewer are left.
        """
        end = self.at + count
        if not self.at <= end <= self._end:
            raise FormatError(f"{self.where}: {count} bytes expected, {self.left} left; the file is cut or corrupt")
        found = self.data[self.at : end]
        self.at = end
        return found

    def u8(self, most: int = 255, what: str = "a field") -> int:
        """Read a byte of at most ``most``."""
        byte = self._byte()
        return byte if byte <= most else self._bounded(byte, most, what)

    def fixed(self, size: int) -> int:
        """Read an unsigned little-endian number of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def varint(self, most: int = 2**63 - 1, what: str = "a number") -> int:
        """Read an unsigned LEB128 number of at most ``most``."""
        # Most numbers of an index are one byte; thousands of them are most of the time of a small file.
        if self.at < self._end and (byte := self.data[self.at]) < 128:
            self.at += 1
            return byte if byte <= most else self._bounded(byte, most, what)
        value = 0
        for position in range(VARINT_BYTES):
            byte = self._byte()
            value |= (byte & 127) << (7 * position)
            if byte < 128:
                return self._bounded(value, most, what)
        raise FormatError(f"{self.where}: {what} is longer than {VARINT_BYTES} bytes; the file is corrupt")

    def zigzag(self, most: int = 2**62, what: str = "a number") -> int:
        """Read a signed number of magnitude at most ``most``."""
        code = self.varint()
        value = -(code >> 1) - 1 if code & 1 else code >> 1
        self._bounded(abs(value), most, what)
        return value

    def text(self, most: int, what: str) -> str:
        """Read a varint length and that many bytes of UTF-8."""
        raw = bytes(self.take(self.varint(most, f"the length of {what}")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: {what} is not UTF-8; the file is corrupt") from None

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            FormatError: bytes remain.
        """
        if self.left:
            raise FormatError(f"{self.where}: {self.left} bytes too many; the file is corrupt")

    def _byte(self) -> int:
        # Thousands of these make an index: a slice of one byte would take most of the time.
        if self.at >= self._end:
            self.take(1)
        self.at += 1
        return int(self.data[self.at - 1])

    def _bounded(self, value: int, most: int, what: str) -> int:
        if value > most:
            raise FormatError(f"{self.where}: {what} is {value}, at most {most} expected; the file is corrupt")
        return value


def varint(value: int) -> bytes:
    """Write an unsigned number below 2⁶³ as LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> bytes:
    """Write a signed number as a varint: 0, −1, 1, −2, … become 0, 1, 2, 3, …"""
    return varint(2 * value if value >= 0 else -2 * value - 1)


def text(value: str) -> bytes:
    """Write a varint length and UTF-8 bytes."""
    raw = value.encode("utf-8")
    return varint(len(raw)) + raw
