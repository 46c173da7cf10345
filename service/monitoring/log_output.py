"""Write log lines to standard output. A blocked reader delays no request, and the lines of processes do not mix."""

import os
import select
import stat
from time import monotonic

STANDARD_OUTPUT = 1
BLOCKED_SECONDS = 1.0  # a write waits this long for a blocked reader


class Blocked(OSError):
    """The reader of the log reads nothing. `lines_written` lines had been written before."""

    def __init__(self, lines_written: int) -> None:
        super().__init__("the reader of standard output is blocked")
        self.lines_written = lines_written


class LogOutput:
    """Writes complete lines to a file descriptor. The lines of several processes do not mix.

    An append to a regular file is atomic at any size. A write to a pipe is atomic only up to PIPE_BUF bytes. A write of
    that size does not block if `poll` reports that the pipe is writable.

    Args:
        descriptor: the file descriptor.
    """

    def __init__(self, descriptor: int = STANDARD_OUTPUT) -> None:
        self._descriptor = descriptor
        self._is_torn = False  # whether the last write ended in the middle of a line

    def write(self, lines: bytes, seconds: float = BLOCKED_SECONDS) -> None:
        """Write `lines`.

        Args:
            lines: complete lines.
            seconds: after this time, `write` no longer waits for a blocked reader.

        Raises:
            Blocked: the reader did not read the lines in time.
            OSError: the lines cannot be written. How many of them were written is unknown.
        """
        is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        max_bytes = len(lines) + 1 if is_file else select.PIPE_BUF
        deadline = monotonic() + seconds
        if self._is_torn:
            lines = b"\n" + lines
        start = 0
        try:
            while start < len(lines):
                end = len(lines)
                if end - start > max_bytes:  # write the lines that fit, or only a part of the first if it is too long
                    end = lines.rfind(b"\n", start, start + max_bytes) + 1 or start + max_bytes
                if not self._wait_until_writable(deadline):
                    raise Blocked(lines.count(b"\n", self._is_torn, start))
                start += os.write(self._descriptor, lines[start:end])
        finally:
            if start:
                self._is_torn = lines[start - 1 : start] != b"\n"

    def _wait_until_writable(self, deadline: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        # `poll` also returns events if the descriptor has an error; os.write then raises the error.
        return bool(poll.poll(max(0.0, deadline - monotonic()) * 1e3))
