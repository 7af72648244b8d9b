"""Blank the code of other GPU generations in a CUDA library, so that it compresses to a file small enough to carry.

python tools/first_light/prune_fatbin.py libnccl.so.2 pruned.so 90

The library keeps its size and layout: removed code becomes zeros, which xz compresses well. Needs readelf.
"""

import argparse
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A section contains fat binaries: a header (magic, version, header size, size of the rest), then entries. Each entry has a header
# (kind, version, header size, code size; the GPU generation at byte 28) and its code, compressed or not.
_MAGIC = 0xBA55ED50
_FAT_HEADER = struct.Struct("<IHHQ")
_ENTRY_HEADER = struct.Struct("<HHIQ")
_GENERATION_AT = 28
_ALIGNMENT = 8
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class Entry:
    """Code for one GPU generation (90 for sm_90), at `start` in the file."""

    kind: int
    generation: int
    start: int
    size: int


def sections(library: Path, name: str) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of the library's sections with this name."""
    listed = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        found = re.match(r"\s*\[\s*\d+\]\s+(\S+)\s+\S+\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", line)
        if found and found[1] == name:
            yield int(found[2], 16), int(found[3], 16)


def fat_binaries(data: bytes | bytearray, offset: int, size: int) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary in a section. Raises ValueError if an entry exceeds its fat binary."""
    at, end = offset, offset + size
    while at + _FAT_HEADER.size <= end:
        magic, _, header_size, fat_size = _FAT_HEADER.unpack_from(data, at)
        if magic != _MAGIC:
            at += _ALIGNMENT
            continue
        stop = at + header_size + fat_size
        yield list(_entries(data, at + header_size, stop))
        at = stop


def _entries(data: bytes | bytearray, at: int, stop: int) -> Iterator[Entry]:
    while at < stop:
        kind, _, header_size, size = _ENTRY_HEADER.unpack_from(data, at)
        (generation,) = struct.unpack_from("<I", data, at + _GENERATION_AT)
        if header_size == 0 or at + header_size + size > stop:
            raise ValueError(f"not a fat binary as this script knows them: entry at byte {at} ends after byte {stop}")
        yield Entry(kind, generation, at + header_size, size)
        at += header_size + size


def wanted(entries: list[Entry], generation: int) -> set[Entry]:
    """Return the code that a GPU of this generation runs: the newest of its major version up to its own, else the PTX."""
    codes = [entry for entry in entries if entry.kind == MACHINE_CODE]
    fitting = [e.generation for e in codes if e.generation // 10 == generation // 10 and e.generation <= generation]
    if fitting:
        return {entry for entry in codes if entry.generation == max(fitting)}
    return {entry for entry in entries if entry.kind == PTX}


def prune(source: Path, target: Path, generation: int) -> Counter[str]:
    """Write `target` with the code for `generation` only; return the bytes kept and blanked.

    Raises ValueError if the library has no code for such a GPU.
    """
    data = bytearray(source.read_bytes())
    counted: Counter[str] = Counter()
    for offset, size in sections(source, ".nv_fatbin"):
        for entries in fat_binaries(data, offset, size):
            keep = wanted(entries, generation)
            for entry in entries:
                if entry not in keep:
                    data[entry.start : entry.start + entry.size] = bytes(entry.size)
                counted["kept" if entry in keep else "blanked"] += entry.size
    if not counted["kept"]:
        raise ValueError(f"{source} holds no code that a GPU of generation {generation} could run")
    # Only linkers read these sections.
    for offset, size in sections(source, "__nv_relfatbin"):
        data[offset : offset + size] = bytes(size)
        counted["blanked"] += size
    target.write_bytes(data)
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("generation", type=int, help="of the GPU: 90 for an H100 or H200, 80 for an A100")
    options = parser.parse_args()
    counted = prune(options.source, options.target, options.generation)
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sorted(counted.items())))


if __name__ == "__main__":
    main()
