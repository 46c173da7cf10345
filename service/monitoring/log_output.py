"""A bounded queue of lines in front of a file descriptor: whoever logs never waits for the reader of the log.

Each process has one queue per descriptor. One thread writes the lines of a queue, and only this thread waits if the
reader is blocked, or if the disk is full. Lines that do not fit into the queue are counted as lost. When the descriptor
takes lines again, one line says how many were lost.

The log handlers, the access log, and the replacements of `sys.stdout` and `sys.stderr` all write through such a queue.
"""

import io
import os
import queue
import select
import stat
import threading
from collections.abc import Callable
from time import sleep

from service.shared_memory import SharedNumber

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
MAX_QUEUED_BYTES = 8 * 2**20  # of the lines that wait in one queue; about 30,000 lines of the access log
MAX_WRITE_BYTES = 256 * 1024  # of lines that are written together; most targets accept them in one system call
FLUSH_SECONDS = 1.0  # a process that ends waits this long for a blocked reader; then it ends without the last lines
MAX_INCOMPLETE = 65536  # characters of an incomplete line in a `QueuedText`; a longer one is queued as a whole line
FULL_PIPE_SECONDS = 0.01  # pause before the next attempt, if a non-blocking descriptor has too little room for a line


class LogOutput:
    """Writes complete lines to a file descriptor. The lines of several processes do not mix.

    An append to a regular file is atomic at any size. A write to a pipe is atomic only up to PIPE_BUF bytes.

    Args:
        descriptor: the file descriptor.
    """

    def __init__(self, descriptor: int = STANDARD_OUTPUT) -> None:
        self._descriptor = descriptor
        self._is_torn = False  # whether the last write ended in the middle of a line

    def write(self, lines: bytes) -> None:
        """Write `lines`, which are complete lines. Wait as long as the reader is blocked.

        Raises:
            OSError: the lines cannot be written. How many of them were written is unknown.
        """
        is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        max_bytes = len(lines) + 1 if is_file else select.PIPE_BUF
        if self._is_torn:
            lines = b"\n" + lines
        start = 0
        try:
            while start < len(lines):
                end = len(lines)
                if end - start > max_bytes:  # write the lines that fit, or only a part of the first if it is too long
                    end = lines.rfind(b"\n", start, start + max_bytes) + 1 or start + max_bytes
                try:
                    start += os.write(self._descriptor, lines[start:end])
                except BlockingIOError:  # another program has made the descriptor non-blocking
                    self._wait_until_writable()
        finally:
            if start:
                self._is_torn = lines[start - 1 : start] != b"\n"

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        # `poll` also returns if the descriptor has an error; os.write then raises the error.
        poll.poll()
        sleep(FULL_PIPE_SECONDS)  # a pipe counts as writable before it has room for a whole line


class LogQueue:
    """The lines that wait to be written to one file descriptor, and the thread that writes them.

    `put` never blocks, and may be called in any thread and in a signal handler.

    Args:
        notice: returns the line that says how many lines were lost.
        write: writes complete lines. Only the queue's thread calls it, and it may block.
        max_bytes: the most bytes of lines that wait. A line that does not fit is lost.

    Attributes:
        lost: array whose element 0 counts the lines that are lost.
    """

    def __init__(
        self, notice: Callable[[int], bytes], write: Callable[[bytes], object], max_bytes: int = MAX_QUEUED_BYTES
    ) -> None:
        self.lost: SharedNumber
        self._notice = notice
        self._write = write
        self._max_bytes = max_bytes
        self.restart_after_fork()

    def restart_after_fork(self) -> None:
        """Begin with an empty queue and without a thread. Call it in a process that has just been forked.

        The thread of the parent does not run in the child, and the parent writes the lines that wait.
        """
        self.lost = [0.0]
        self._lock = threading.RLock()  # reentrant, because a signal handler may interrupt `put` and log a line
        self._pending: queue.SimpleQueue[tuple[bytes, int] | threading.Event] = queue.SimpleQueue()
        self._pending_bytes = 0
        self._unreported = 0  # lines that are lost and not reported in the log yet
        self._thread: threading.Thread | None = None

    def put(self, lines: bytes, count: int = 1) -> None:
        """Queue complete lines, or count them as lost if they do not fit. `count` is the number of lines."""
        with self._lock:
            if self._pending_bytes + len(lines) > self._max_bytes or not self._start():
                self._lose(count)
                return
            self._pending_bytes += len(lines)
            self._pending.put((lines, count))

    def count_lost_in(self, lost: SharedNumber) -> None:
        """Count lost lines in element 0 of `lost` from now on, and add the number of lines that are already lost."""
        with self._lock:
            if self.lost is not lost:
                lost[0] += self.lost[0]
                self.lost = lost

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until all lines that are queued now are written or lost. Return False if that takes over `seconds`."""
        if self._thread is None:
            return True
        reached = threading.Event()
        self._pending.put(reached)
        return reached.wait(seconds)

    def _start(self) -> bool:
        """Start the thread if it does not run. Return False if no thread can be started."""
        if self._thread is None:
            # A daemon, because a process that ends does not wait for a blocked reader.
            thread = threading.Thread(target=self._run, args=(self._pending,), name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _run(self, pending: "queue.SimpleQueue[tuple[bytes, int] | threading.Event]") -> None:
        while True:
            items = [pending.get()]
            size = 0
            while not isinstance(items[-1], threading.Event):
                size += len(items[-1][0])
                if size >= MAX_WRITE_BYTES or pending.empty():
                    break
                items.append(pending.get())
            self._write_items([item for item in items if not isinstance(item, threading.Event)])
            if isinstance(items[-1], threading.Event):
                items[-1].set()

    def _write_items(self, items: list[tuple[bytes, int]]) -> None:
        """Write lines, and after them the number of lines that were lost."""
        lines = b"".join([lines for lines, _ in items])
        failed = reported = 0
        try:
            if lines:
                self._write(lines)
        except OSError:  # the disk is full, or the reader has gone
            failed = sum(count for _, count in items)
        else:
            reported = self._report_lost()
        with self._lock:
            self._pending_bytes -= len(lines)
            self._unreported -= reported
            if failed:
                self._lose(failed)

    def _report_lost(self) -> int:
        """Write the number of lines that are lost and not reported yet. Return the number if this succeeds, else 0."""
        lost = self._unreported
        try:
            if lost:
                self._write(self._notice(lost))
        except OSError:
            return 0
        return lost

    def _lose(self, count: int) -> None:
        self._unreported += count
        self.lost[0] += count


class QueuedText(io.TextIOBase):
    """A text stream, such as `sys.stderr`, whose lines go through a `LogQueue`. It may lose lines, but never blocks.

    Args:
        lines: the queue.
        descriptor: the file descriptor to which the queue writes.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, lines: LogQueue, descriptor: int) -> None:
        super().__init__()
        self.lines = lines
        self._descriptor = descriptor
        self.restart_after_fork()

    def restart_after_fork(self) -> None:
        """Forget an incomplete line. Call it in a process that has just been forked."""
        self._lock = threading.RLock()
        self._incomplete = ""  # the text after the last line end

    def write(self, text: str) -> int:
        """Queue the complete lines in `text`, and keep the rest until its line is complete."""
        with self._lock:
            whole, end, self._incomplete = (self._incomplete + text).rpartition("\n")
            if end:
                self._put(whole + end)
            if len(self._incomplete) > MAX_INCOMPLETE:
                self.finish()
        return len(text)

    def finish(self) -> None:
        """Queue the incomplete line, if there is one, with a line end."""
        with self._lock:
            rest, self._incomplete = self._incomplete, ""
            if rest:
                self._put(rest + "\n")

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def _put(self, text: str) -> None:
        self.lines.put(text.encode(self.encoding, self.errors), text.count("\n"))
