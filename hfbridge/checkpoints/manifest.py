"""Size and checksum of each checkpoint file, by which damaged and exchanged files are recognized.

The format has no checksums. The manifest is stored inside rng_state.pth, where the HF Trainer does not look.
Its CRC covers the first and last 64 KiB of a file: it costs next to nothing, and finds files that were
truncated, emptied or exchanged for another step's.
"""

import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

from hfbridge.checkpoints.layout import files_in

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


def make_manifest(folder: Path, *, without: Collection[str] = ()) -> Manifest:
    """Describe the files of a directory, except those named in `without`."""
    return {name: fingerprint(path) for name, path in files_in(folder).items() if name not in without}


def find_damage(folder: Path, manifest: Mapping[str, list[int]]) -> list[str]:
    """Return one line for each file that differs from the manifest."""
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
