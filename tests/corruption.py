"""Seeded damage to files, and a guard that lets only ScanNetError through."""

import os
import time
import tracemalloc

from w2r2.scans.files import ScanNetError

HUGE = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def corrupt(data, rng, fields=()):
    """A damaged copy of `data`: flipped bits, a cut, an insertion, or a number overwritten. `fields` are (offset,
    width) of known numbers."""
    data, kind = bytearray(data), rng.integers(4)
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[rng.integers(len(data)) :]
    elif kind == 2:
        at = rng.integers(len(data) + 1)
        data[at:at] = rng.bytes(rng.integers(1, 65))
    else:
        offset, width = (
            fields[rng.integers(len(fields))]
            if len(fields) and rng.random() < 0.8
            else (rng.integers(max(1, len(data) - 8)), 4)
        )
        value = HUGE[rng.integers(len(HUGE))] if rng.random() < 0.8 else int(rng.integers(2**62))
        data[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(data)


def guarded(read, budget, seconds=2.0):
    """Whether `read()` succeeded; anything but success or ScanNetError, more than `budget` bytes or `seconds` of CPU
    time fails the test."""
    for _ in range(
        2
    ):  # the interpreter's own tables grow by megabytes now and then; what the reader needs, it needs again
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            read()
            good = True
        except ScanNetError as error:
            assert error.where and error.remedy and os.path.basename(str(error.file)) in str(error)
            good = False
        peak = tracemalloc.get_traced_memory()[1] - before
        assert time.process_time() - start < seconds
        if peak <= budget:
            return good
    raise AssertionError(f"{peak:,} bytes")
