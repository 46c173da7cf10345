"""Log lines on standard output: one JSON object each, or text for a person."""

import asyncio
import logging
import os
import select
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter, time
from typing import Any

import orjson

from service.monitoring.timings import RequestRecord

ACCESS = "elbo.access"
TOGETHER = 32  # requests that are put into words in one go
GATHER_SECONDS = 0.05  # in which their lines are gathered, to be written together
MOST_LINES = 20_000  # that wait for a reader of standard output who does not read; more are counted, not kept
LOST = "lines of requests were lost: they could not be written"
LOGGERS = ("elbo", "uvicorn.error", "py.warnings")


class AccessLog:
    """A line for each request, written by another thread: no request waits for a slow reader.

    Several are put into words in a row, off the way of each.

    Args:
        form: "json" or "text".
        enabled: whether anything is written.
        write: takes whole lines, in that thread.
    """

    def __init__(self, form: str, enabled: bool, write: Callable[[bytes], object] | None = None) -> None:
        self._as_text = form == "text"
        self._enabled = enabled
        self._write = write or _to_standard_output
        self._over: list[RequestRecord] = []
        self._lines: list[bytes] = []
        self._lost = 0
        self._writer: asyncio.Task[None] | None = None

    def tell(self, record: RequestRecord) -> None:
        """Note that a request has been answered."""
        if not self._enabled:
            return
        self._over.append(record)
        if len(self._over) >= TOGETHER:
            self._put_into_words()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def close(self) -> None:
        """Write what has been gathered."""
        if self._writer:
            await self._writer

    async def _write_all(self) -> None:
        while self._over or self._lines:
            await asyncio.sleep(GATHER_SECONDS)
            self._put_into_words()
            (lines, self._lines), lost = (self._lines, []), self._lost
            notice = self._line(time(), LOST, {"lost": lost}) if lost else b""
            try:
                await asyncio.to_thread(self._write, b"".join([*lines, notice]))
                self._lost -= lost
            except OSError:  # the disk is full, or the reader has gone: serving goes on, and so do lines when they can
                self._lost += len(lines)
        self._writer = None

    def _put_into_words(self) -> None:
        over, self._over = self._over, []
        room = MOST_LINES - len(self._lines)
        self._lost += len(over[room:])
        zero = time() - perf_counter()  # the clock of traces began
        for record in over[:room]:
            self._lines.append(self._line(zero + record.started + record.total, "request", _told(record)))

    def _line(self, at: float, message: str, fields: dict[str, Any]) -> bytes:
        moment = datetime.fromtimestamp(at, UTC)
        if self._as_text:
            return f"{moment.isoformat(sep=' ', timespec='milliseconds')} INFO    {message} {_pairs(fields)}\n".encode()
        head = {"ts": moment.isoformat(timespec="milliseconds"), "level": "info", "logger": ACCESS, "message": message}
        return orjson.dumps(head | fields, option=orjson.OPT_APPEND_NEWLINE)


def _told(record: RequestRecord) -> dict[str, Any]:
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "client": record.client,
        "ms": round(record.total * 1e3, 3),
    }
    if record.model:
        fields |= {"model": record.model, "version": record.version, "rows": record.rows}
    if record.compute:
        fields["parse_ms"] = round(record.parse * 1e3, 3)
        fields["queue_ms"] = round(record.queue * 1e3, 3)
        fields["compute_ms"] = round(record.compute * 1e3, 3)
        fields["write_ms"] = round(record.write * 1e3, 3)
    return fields


def _to_standard_output(lines: bytes) -> None:
    """Write whole lines. Other workers write there too: a file keeps their writes apart, a pipe only short ones."""
    output = sys.stdout.fileno()
    most = len(lines) if stat.S_ISREG(os.fstat(output).st_mode) else select.PIPE_BUF
    start = 0
    while start < len(lines):
        end = len(lines)
        if end - start > most:
            end = lines.rfind(b"\n", start, start + most) + 1 or lines.index(b"\n", start) + 1
        start += os.write(output, lines[start:end])


def _pairs(fields: dict[str, Any]) -> str:
    return " ".join([f"{key}={value}" for key, value in fields.items()])


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a record carries as `fields` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class TextFormatter(logging.Formatter):
    """Time, level, message, and the `fields` as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        fields = getattr(record, "fields", {})
        return f"{super().formatMessage(record)} {_pairs(fields)}".rstrip()


def configure(level: str, form: str) -> None:
    """Send this process's log lines to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
