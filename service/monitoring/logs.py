"""The log on standard output: one JSON object per line, or text for people."""

import asyncio
import logging
import os
import select
import stat
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import perf_counter, time
from typing import Any

import orjson

from service.monitoring.request_record import RequestRecord

LOGGERS = ("elbo", "uvicorn.error", "py.warnings")
ACCESS_LOGGER = "elbo.access"
FORMAT_BATCH = 32  # number of access records that are formatted together
FLUSH_SECONDS = 0.05  # access lines are collected for this time, then written together
MAX_PENDING_LINES = 20_000  # maximum number of access lines that wait to be written; further lines are only counted
LOST_LINES = "access log lines were lost because standard output was blocked or failed; check its reader and the disk"


def format_line(
    log_format: str, seconds: float, level: str, logger: str, message: str, fields: Mapping[str, Any]
) -> bytes:
    """Return one log line, with its newline.

    Args:
        log_format: "json" for one JSON object, or "text" for time, level, message and the fields as key=value.
        seconds: Unix time.
        level: level of the message, in upper case.
        logger: name of the logger; left out of text.
        message: what happened.
        fields: names and values that belong to the message.
    """
    moment = datetime.fromtimestamp(seconds, UTC)
    if log_format == "text":
        pairs = "".join([f" {key}={value}" for key, value in fields.items()])
        return f"{moment.isoformat(sep=' ', timespec='milliseconds')} {level:7} {message}{pairs}\n".encode()
    line = {
        "ts": moment.isoformat(timespec="milliseconds"),
        "level": level.lower(),
        "logger": logger,
        "message": message,
        **fields,
    }
    return orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)


class AccessLog:
    """The access log: one line per request, written by another thread, so that a slow reader delays no request.

    Lines are formatted in batches, after the responses have been sent.

    Args:
        log_format: "json" or "text".
        enabled: whether requests are logged.
        write: a function that writes complete lines. It is called in another thread. The default writes to standard
            output.
    """

    def __init__(self, log_format: str, enabled: bool, write: Callable[[bytes], object] | None = None) -> None:
        self._log_format = log_format
        self._enabled = enabled
        self._write = write or _write_to_standard_output
        self._records: list[RequestRecord] = []  # not formatted yet
        self._lines: list[bytes] = []  # not written yet
        self._lost = 0
        self._writer: asyncio.Task[None] | None = None

    def log(self, record: RequestRecord) -> None:
        """Log a request that has ended."""
        if not self._enabled:
            return
        self._records.append(record)
        if len(self._records) >= FORMAT_BATCH:
            self._format_records()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_pending())

    async def close(self) -> None:
        """Wait until everything is written."""
        if self._writer:
            await self._writer

    async def _write_pending(self) -> None:
        while self._records or self._lines:
            await asyncio.sleep(FLUSH_SECONDS)
            self._format_records()
            lines, self._lines = self._lines, []
            lost = self._lost
            notice = b""
            if lost:
                notice = format_line(self._log_format, time(), "WARNING", ACCESS_LOGGER, LOST_LINES, {"lost": lost})
            try:
                await asyncio.to_thread(self._write, b"".join([*lines, notice]))
                self._lost -= lost
            except OSError:  # the disk is full or the reader has gone: drop these lines and keep serving
                self._lost += len(lines)
        self._writer = None

    def _format_records(self) -> None:
        records, self._records = self._records, []
        room = MAX_PENDING_LINES - len(self._lines)
        self._lost += len(records[room:])
        clock_offset = time() - perf_counter()  # the time of a record plus this offset is a Unix time
        for record in records[:room]:
            ended = clock_offset + record.started + record.total
            fields = _access_fields(record)
            self._lines.append(format_line(self._log_format, ended, "INFO", ACCESS_LOGGER, "request", fields))


def _access_fields(record: RequestRecord) -> dict[str, Any]:
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


def _write_to_standard_output(lines: bytes) -> None:
    """Write complete lines so that they do not mix with the lines of other workers.

    An append to a regular file is atomic at any size. A write to a pipe is atomic only up to PIPE_BUF bytes.
    """
    output = sys.stdout.fileno()
    is_file = stat.S_ISREG(os.fstat(output).st_mode)
    max_bytes = len(lines) if is_file else select.PIPE_BUF
    start = 0
    while start < len(lines):
        end = len(lines)
        if end - start > max_bytes:  # write the lines that fit in max_bytes, or a single line if it is longer
            end = lines.rfind(b"\n", start, start + max_bytes) + 1 or lines.index(b"\n", start) + 1
        start += os.write(output, lines[start:end])


class Formatter(logging.Formatter):
    """Formats the records of `logging` like those of `AccessLog`. A record may have extra values in `fields`.

    Args:
        log_format: "json" or "text".
    """

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline. In the format "text", a traceback follows on further lines."""
        fields = dict(getattr(record, "fields", {}))
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if traceback and self._log_format == "json":
            fields["exception"] = traceback
        message = record.getMessage()
        encoded = format_line(self._log_format, record.created, record.levelname, record.name, message, fields)
        line = encoded.decode().removesuffix("\n")  # the handler appends the newline
        return f"{line}\n{traceback}" if traceback and self._log_format == "text" else line


def configure(level: str, log_format: str) -> None:
    """Send the log of this process to standard output.

    Args:
        level: the lowest level that is logged, as in ELBO_LOG_LEVEL.
        log_format: "json" or "text".
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Formatter(log_format))
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
