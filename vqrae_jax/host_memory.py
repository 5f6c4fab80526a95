"""How the C library hands out this process's memory."""

import ctypes

# Numbers of glibc's mallopt(3), and values: one heap for all threads; nothing in mappings of its own, which are given
# back as soon as they are freed; up to 2 GiB of freed memory kept; growth in large steps.
ARENA_MAX, MMAP_MAX, TOP_PAD, TRIM_THRESHOLD = -8, -4, -2, -1
SETTINGS = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}


def keep_freed_memory() -> bool:
    """Freed memory stays with the process, to be used again; True where the C library can be told so (glibc).

    XLA on a CPU frees and allocates the buffers of a program at every call. Given back to the system in between, their
    pages are cleared and mapped anew each time: a quantizer's training step lost a fifth of its time so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(number, value) for number, value in SETTINGS.items())
