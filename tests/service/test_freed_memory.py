"""Freed memory goes back to the operating system."""

import platform
import subprocess
import sys

import pytest

from tests.data import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps free memory in this way")

START = """
import ctypes
from service.freed_memory import return_freed_memory, unmap_large_blocks

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
"""
BLOCKS = """
unmap_large_blocks()
library.free(library.malloc(30 * 2**20))  # glibc would now keep blocks of up to this size
before = resident()
blocks = [library.malloc(8 * 2**20) for _ in range(4)]
for block in blocks:
    ctypes.memset(block, 1, 8 * 2**20)
for block in blocks[:-1]:
    library.free(block)
print(resident() - before)
"""
PAGES = """
before = resident()
blocks = [library.malloc(64 * 1024) for _ in range(512)]
for block in blocks:
    ctypes.memset(block, 1, 64 * 1024)
for block in [block for number, block in enumerate(blocks) if number % 8]:
    library.free(block)
return_freed_memory()
print(resident() - before)
"""


@pytest.mark.parametrize(("program", "mebibytes"), [(BLOCKS, 8), (PAGES, 4)], ids=["large blocks", "pages between"])
def test_freed_memory_is_returned_while_memory_behind_it_is_in_use(program: str, mebibytes: int) -> None:
    command = [sys.executable, "-c", START + program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) < (mebibytes + 2) * 2**20
