"""The little of a cubin that tests look at: which kernels it holds, and the sizes of their arguments."""

from __future__ import annotations

import struct

_KPARAM_INFO = 0x17
_KPARAM_INFO_V2 = 0x45
_WITH_SIZE = 4
"""The format of an attribute that is followed by as many bytes as it says."""


def sections(cubin: bytes) -> dict[str, bytes]:
    """Return the sections of a 64-bit ELF file by name."""
    assert cubin[:6] == b"\x7fELF\x02\x01", "not a little-endian 64-bit ELF file"
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, table + entry_size * number) for number in range(count)]
    start_of_names = headers[names][4]
    found = {}
    for name, _, _, _, offset, size in headers:
        start = start_of_names + name
        found[cubin[start : cubin.index(b"\0", start)].decode()] = cubin[offset : offset + size]
    return found


def kernels(cubin: bytes) -> dict[str, list[int]]:
    """Return the kernels of a cubin, and for each the bytes of its arguments in order."""
    found = {}
    parts = sections(cubin)
    for name in parts:
        if name.startswith(".text."):
            kernel = name.removeprefix(".text.")
            found[kernel] = _argument_sizes(parts[f".nv.info.{kernel}"])
    return found


def _argument_sizes(info: bytes) -> list[int]:
    sizes: dict[int, int] = {}
    at = 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<2BH", info, at)
        at += 4
        if form != _WITH_SIZE:
            continue
        if attribute in (_KPARAM_INFO, _KPARAM_INFO_V2):
            _, ordinal, _, packed = struct.unpack_from("<I2HI", info, at)
            sizes[ordinal] = packed >> 18
        at += length
    return [sizes[ordinal] for ordinal in sorted(sizes)]
