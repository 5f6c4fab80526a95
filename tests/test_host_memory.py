import resource
import subprocess
import sys

import pytest

from vqrae_jax.host_memory import keep_freed_memory

ROUNDS, SIZE = 20, 40 * 2**20  # beyond what glibc keeps by itself
FAULTS = f"""
import resource
from vqrae_jax.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        b"1" * {SIZE}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not keep_freed_memory(), reason="no glibc")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    pages = ROUNDS * SIZE // resource.getpagesize()
    assert given_back > pages // 2
    assert kept < pages // 100
