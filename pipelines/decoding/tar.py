"""Write and read members of a plain tar file: a header block, the content, zeros up to the next block."""

import hashlib
import tarfile
from typing import BinaryIO

BLOCK_BYTES = 512
_END = bytes(2 * BLOCK_BYTES)


def member_header(name: str, size_bytes: int) -> bytes:
    """Make a member's header block, without time or user, so that the same clips always make the same shard."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def read_header(block: bytes) -> tuple[str, int]:
    """Read (name, content bytes) from a header block. Raises ValueError if the block's checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"no header of a tar member ({error})") from None
    return info.name, info.size


def padding(size_bytes: int) -> int:
    """Count the zeros that follow a member's content of that size."""
    return -size_bytes % BLOCK_BYTES


def member_space(size_bytes: int) -> int:
    """Count the bytes that a member takes in the file, with header and padding."""
    return BLOCK_BYTES + size_bytes + padding(size_bytes)


class TarWriter:
    """Writes members to a file and tracks the file's size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def add(self, name: str, content: bytes) -> int:
        """Add a member; returns the offset of its content."""
        self._write(member_header(name, len(content)))
        offset = self.size_bytes
        self._write(content)
        self._write(bytes(padding(len(content))))
        return offset

    def finish(self) -> str:
        """Write the end of the archive; returns the sha256 of the whole file."""
        self._write(_END)
        return self._sha256.hexdigest()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.size_bytes += len(content)
