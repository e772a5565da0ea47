"""How the files of a checkpoint are told from damaged or exchanged ones; knows neither engine.

The native format has no checksums. The manifest is kept inside rng_state.pth, where the native Trainer does
not look: of each file its size, and a checksum of its first and last 64 KiB, which is the whole of a small
one. So it costs next to nothing, and finds a file that was cut off, emptied or exchanged for another step's.
"""

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_END = 64 * 1024

Manifest = dict[str, list[int]]
"""Name of a file -> its size in bytes, and the CRC-32 of its two ends."""


def fingerprint(path: Path) -> list[int]:
    """Read the size and the checksum of both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        checksum = zlib.crc32(file.read(_END))
        if size > _END:
            file.seek(max(_END, size - _END), os.SEEK_SET)
            checksum = zlib.crc32(file.read(_END), checksum)
    return [size, checksum]


def make_manifest(folder: Path, *, without: Iterable[str] = ()) -> Manifest:
    """Describe all files of a directory but some."""
    left_out = set(without)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: fingerprint(path) for name, path in names.items() if name not in left_out}


def find_damage(folder: Path, manifest: Mapping[str, list[int]]) -> list[str]:
    """Say what of a directory is not as it was written: one line a file."""
    problems = []
    for name, (size, checksum) in manifest.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing.")
            continue
        found = fingerprint(path)
        if found[0] == 0 and size:
            problems.append(f"{name} is empty.")
        elif found[0] != size:
            problems.append(f"{name} has {found[0]} bytes and was written with {size}: cut off or exchanged.")
        elif found[1] != checksum:
            problems.append(f"{name} is not the file that was written: damaged or exchanged.")
    return problems
