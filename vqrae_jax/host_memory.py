"""How the C library hands out a process's memory."""

import ctypes

# By glibc's environment variables: the number that mallopt(3) knows each by, and the value. One heap for all threads;
# nothing in mappings of its own, which are given back as soon as they are freed; up to 2 GiB of freed memory kept;
# growth in large steps.
SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 2**28),
}


def keep_freed_memory() -> bool:
    """Freed memory stays with the process, to be used again; True where the C library can be told so (glibc).

    XLA on a CPU frees and allocates the buffers of a program at every call. Given back to the system in between, their
    pages are cleared and mapped anew each time: a quantizer's training step lost a fifth of its time so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(number, value) for number, value in SETTINGS.values())


def environment() -> dict[str, str]:
    """The same for a process that is yet to start."""
    return {name: str(value) for name, (_, value) in SETTINGS.items()}
