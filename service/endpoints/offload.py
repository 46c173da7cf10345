"""Decide whether CPU work for one request runs in the event loop or in another thread.

While the event loop parses or writes a body, every other request waits. If the body is small, however, it takes longer
to hand the work to a thread than to do the work. Callers therefore estimate how long their work takes, and only work
that takes long runs in another thread.
"""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.codec.budget import Budget, TurnOver

T = TypeVar("T")
MAX_LOOP_NS = 2_000_000  # maximum time for which one request may block the event loop, in nanoseconds

SMALL_BODY = 2048  # bytes; reading so small a body takes at most 2 ms, whatever it contains
FEW_ROWS = 64  # describing the errors of so few rows takes at most 3 ms

# Estimated times in nanoseconds.
JSON_BYTE = 4  # time to parse one byte of JSON; 512 KiB take about 2 ms
ARRAY_BYTE = JSON_BYTE / 8  # time to copy one byte of npy or safetensors
NUMBER = 10 * JSON_BYTE  # time to write one number, as about 10 characters of JSON or as pixels
NORMAL = 8 * JSON_BYTE  # time to draw one normal random number
VERDICT = 400 * JSON_BYTE  # time to build and write the result of one row
RECORD_BYTE = 8 * JSON_BYTE  # time to parse one byte of NDJSON
RECORD_VALUE = 8 * JSON_BYTE  # time to assign one value of a record to its feature
SNAPPY_BYTE = 16 * JSON_BYTE  # time to decompress and parse one byte of a remote-write body
PICTURE_BYTE = math.inf  # a picture, too, may be far larger than its body
GZIP_BODY = math.inf  # a gzip body counts as infinitely long work, because its decompressed size is unknown


async def run_in_thread_if_long(work: Callable[[], T], estimated_ns: float) -> T:
    """Return the result of `work`, which runs in another thread if `estimated_ns` is above MAX_LOOP_NS."""
    if estimated_ns > MAX_LOOP_NS:
        return await asyncio.to_thread(work)
    return work()


async def read_within_budget(
    readers: ThreadPoolExecutor, read: Callable[[], T], budget: Budget, estimated_ns: float
) -> T:
    """Return the result of `read`, which draws from `budget`.

    `read` runs in a thread of `readers` if `estimated_ns` is above MAX_LOOP_NS. Otherwise it runs in the event loop.
    If it blocks the event loop for too long, it stops and is called again in a thread.
    """
    if estimated_ns <= MAX_LOOP_NS:
        budget.start(in_event_loop=True)
        try:
            return read()
        except TurnOver:
            pass
        finally:
            budget.stop()

    def read_in_thread() -> T:
        budget.start(in_event_loop=False)
        try:
            return read()
        finally:
            budget.stop()

    return await asyncio.get_running_loop().run_in_executor(readers, read_in_thread)
