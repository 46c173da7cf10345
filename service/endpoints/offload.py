"""Decide whether CPU work for one request runs in the event loop or in another thread.

While the event loop parses or writes a body, every other request waits. But for a small body, handing the work to a
thread takes longer than the work. Callers therefore estimate the cost of their work, and only long work moves to a
thread.
"""

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MAX_LOOP_NS = 2_000_000  # how long one request may block the event loop

# Estimated nanoseconds per unit of work.
JSON_BYTE = 4  # parse JSON: 512 KiB take about 2 ms
ARRAY_BYTE = JSON_BYTE / 8  # read or write npy and safetensors, whose bytes are copied as they are
NUMBER = 10 * JSON_BYTE  # write a number as JSON, which takes about 10 characters, or as pixels
VERDICT = 400 * JSON_BYTE  # build and write the result of one row
RECORD_BYTE = 8 * JSON_BYTE  # parse NDJSON
RECORD_VALUE = 8 * JSON_BYTE  # assign a value of a record to its feature
SNAPPY_BYTE = 16 * JSON_BYTE  # decompress and parse remote-write samples
GZIP_BODY = math.inf  # the size of the decompressed body is not known in advance


async def run_in_thread_if_long(work: Callable[[], T], estimated_ns: float) -> T:
    """Return `work()`, computed in another thread if it is expected to block the event loop for too long."""
    if estimated_ns > MAX_LOOP_NS:
        return await asyncio.to_thread(work)
    return work()
