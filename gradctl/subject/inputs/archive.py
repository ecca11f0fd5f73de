"""Zip archives (``.npz``, ``.pt``, ``.pt2``), checked against the size that they declare before they are unpacked."""

from __future__ import annotations

import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from gradctl.core.errors import TrustError

# torch does not compress, deflate takes a third off weights, and all it can is 1 to 1032. What is small is no harm.
_RATIO = 100
_LARGE = 2**28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def ensure_unpacks(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise where the members of an archive, unpacked, are out of all proportion to the file.

    Raises:
        TrustError: GC903.
    """
    size, unpacked = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if unpacked > max(_LARGE, _RATIO * size):
        said = f"{path} has {size:,} bytes and unpacks to {unpacked:,}. Write it without compression if that is right."
        raise TrustError("GC903", said)


def read_array(member: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Return the array in an ``.npy`` file of ``size`` bytes, compared with its header before memory is allocated.

    Raises:
        ValueError: it is not an array, is damaged, or holds pickled objects, which are not loaded.
    """
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"its .npy format {version[0]}.{version[1]} is not supported")
    try:
        shape, _, dtype = _HEADERS[version](member)
    except (SyntaxError, tokenize.TokenError, MemoryError, RecursionError) as error:  # of Python's parser
        raise ValueError("its header is no Python literal") from error
    needed = dtype.itemsize
    for length in shape:
        needed *= length
    if not dtype.hasobject and needed > size:
        raise ValueError(f"its header says {needed} bytes, and it has {size}")
    member.seek(0)
    return np.lib.format.read_array(member, allow_pickle=False)
