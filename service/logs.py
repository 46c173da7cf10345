"""Log lines on standard output: one JSON object each, or text for a person."""

import asyncio
import logging
import select
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.types import Scope

from service.tracing import Trace

ACCESS = "elbo.access"
GATHER_SECONDS = 0.05  # in which lines of requests are gathered, to be written together
MOST_LINES = 20_000  # that wait for a reader of standard output who does not read; more are counted, not kept
LOGGERS = ("elbo", "uvicorn.error", "py.warnings")


class AccessLog:
    """A line for each request, gathered and written by another thread: no request waits for a slow reader.

    Args:
        form: "json" or "text".
        enabled: whether anything is written.
        write: takes whole lines, in that thread.
    """

    def __init__(self, form: str, enabled: bool, write: Callable[[bytes], object] | None = None) -> None:
        self._as_text = form == "text"
        self._enabled = enabled
        self._write = write or _to_standard_output
        self._lines: list[bytes] = []
        self._lost = 0
        self._writer: asyncio.Task[None] | None = None

    def tell(self, scope: Scope, trace: Trace) -> None:
        """Note that a request has been answered."""
        if not self._enabled:
            return
        if len(self._lines) >= MOST_LINES:
            self._lost += 1
            return
        self._lines.append(self._line("request", _told(scope, trace)))
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def close(self) -> None:
        """Write what has been gathered."""
        if self._writer:
            await self._writer

    async def _write_all(self) -> None:
        while self._lines:
            await asyncio.sleep(GATHER_SECONDS)
            if self._lost:
                self._lines.append(self._line("lines of requests were lost: nobody read them", {"lost": self._lost}))
                self._lost = 0
            lines, self._lines = self._lines, []
            await asyncio.to_thread(self._write, b"".join(lines))
        self._writer = None

    def _line(self, message: str, fields: dict[str, Any]) -> bytes:
        if self._as_text:
            now = datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds")
            return f"{now} INFO    {message} {_pairs(fields)}\n".encode()
        head = {"ts": _now(), "level": "info", "logger": ACCESS, "message": message}
        return orjson.dumps(head | fields, option=orjson.OPT_APPEND_NEWLINE)


def _told(scope: Scope, trace: Trace) -> dict[str, Any]:
    client = scope.get("client")
    fields = {
        "request_id": trace.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": trace.status,
        "client": client[0] if client else None,
        "ms": round(trace.elapsed * 1e3, 3),
    }
    if trace.model:
        fields |= {"model": trace.model, "version": trace.version, "rows": trace.rows}
        for name, seconds in trace.spans.items():
            fields[f"{name}_ms"] = round(seconds * 1e3, 3)
    return fields


def _to_standard_output(lines: bytes) -> None:
    """Write whole lines, as many at a time as the system writes in one go: other workers write there too."""
    start = 0
    while start < len(lines):
        end = len(lines)
        if end - start > select.PIPE_BUF:
            end = lines.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or lines.index(b"\n", start) + 1
        sys.stdout.buffer.write(lines[start:end])
        sys.stdout.buffer.flush()
        start = end


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
