"""The log on standard output: one JSON object per line, or text for people.

A line that cannot be written, because the disk is full, the reader is blocked or standard output is closed, is counted
as lost. The server continues to serve, and to write later lines.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import perf_counter, time
from typing import Any

import orjson

from models.errors import printable
from service.monitoring.log_output import STANDARD_OUTPUT, Blocked, LogOutput
from service.monitoring.request_record import RequestRecord
from service.shared_memory import SharedNumber

LOGGERS = ("elbo", "uvicorn.error", "py.warnings")
ACCESS_LOGGER = "elbo.access"
FORMAT_BATCH = 32  # number of access records that are formatted together
FLUSH_SECONDS = 0.05  # access lines are collected for this time, then written together
MAX_PENDING_LINES = 20_000  # maximum number of access lines that wait to be written; further lines are only counted
MESSAGE_SECONDS = 0.1  # a message waits this long for a blocked reader, then it is lost; meanwhile no request is served
LOST_LINES = "log lines were lost because standard output was blocked or failed; check its reader and the disk"
_QUOTED = re.compile(r'[\s"=\\]')  # text with one of these characters is quoted in the format "text"
# Characters that JSON allows but that control a terminal, begin a line in some viewers, or reorder text.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


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
        pairs = "".join([f" {key}={_text_value(value)}" for key, value in fields.items()])
        return f"{moment.isoformat(sep=' ', timespec='milliseconds')} {level:7} {printable(message)}{pairs}\n".encode()
    line = {
        "ts": moment.isoformat(timespec="milliseconds"),
        "level": level.lower(),
        "logger": logger,
        "message": message,
        **fields,
    }
    try:
        encoded = orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # lone surrogates, and integers of more than 64 bits
        return f"{json.dumps(line, default=str)}\n".encode()
    if encoded.isascii() and b"\x7f" not in encoded:
        return encoded
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded.decode()).encode()


def _text_value(value: Any) -> str:
    """Return a value as text. It is quoted if it could otherwise be taken for several values, or for another line."""
    text = str(value)
    if text and text.isprintable() and not _QUOTED.search(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


class AccessLog:
    """The access log: one line per request, written by another thread, so that a slow reader delays no request.

    Lines are formatted in batches, after the responses have been sent.

    Args:
        log_format: "json" or "text".
        enabled: whether requests are logged.
        write: a function that writes complete lines. It is called in another thread. The default writes to standard
            output.
        lost: array whose element 0 counts the lines that are lost.
    """

    def __init__(
        self,
        log_format: str,
        enabled: bool,
        write: Callable[[bytes], object] | None = None,
        lost: SharedNumber | None = None,
    ) -> None:
        self._log_format = log_format
        self._enabled = enabled
        self._write = write or _standard_output().write
        self._all_lost: SharedNumber = [0.0] if lost is None else lost
        self._records: list[RequestRecord] = []  # not formatted yet
        self._lines: list[bytes] = []  # not written yet
        self._lost = 0  # lines that are lost and not reported in the log yet
        self._closing = False
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
        """Wait until everything is written, or until the reader of standard output has blocked one more write."""
        self._closing = True
        if self._writer:
            await self._writer
        self._closing = False

    async def _write_pending(self) -> None:
        try:
            while self._records or self._lines:
                await asyncio.sleep(FLUSH_SECONDS)
                self._format_records()
                lines, self._lines = self._lines, []
                await self._write_lines(lines)
        finally:
            self._writer = None

    async def _write_lines(self, lines: list[bytes]) -> None:
        """Write `lines` and the number of lost lines. If the reader is blocked, keep the rest of `lines` for later."""
        lost = self._lost
        notice = _lost_notice(self._log_format, lost) if lost else b""
        try:
            await asyncio.to_thread(self._write, b"".join([*lines, notice]))
            self._lost -= lost
        except Blocked as error:
            rest = lines[error.lines_written :]
            if self._closing:
                self._lose(len(rest))
            else:
                self._lines = rest + self._lines
        except (OSError, RuntimeError):  # the disk is full, the reader has gone, or no thread can be started
            self._lose(len(lines))

    def _lose(self, lines: int) -> None:
        self._lost += lines
        self._all_lost[0] += lines

    def _format_records(self) -> None:
        records, self._records = self._records, []
        room = MAX_PENDING_LINES - len(self._lines)
        self._lose(len(records[room:]))
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


def _lost_notice(log_format: str, lost: int) -> bytes:
    return format_line(log_format, time(), "WARNING", ACCESS_LOGGER, LOST_LINES, {"lost": lost})


class Formatter(logging.Formatter):
    """Formats the records of `logging` like those of `AccessLog`. A record may have extra values in `fields`.

    Args:
        log_format: "json" or "text".
    """

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline. In the format "text", a traceback follows on further, indented lines."""
        fields = dict(getattr(record, "fields", {}))
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if traceback and self._log_format == "json":
            fields["exception"] = traceback
        message = record.getMessage()
        encoded = format_line(self._log_format, record.created, record.levelname, record.name, message, fields)
        line = encoded.decode().removesuffix("\n")  # the handler appends the newline
        if traceback and self._log_format == "text":
            return "\n    ".join([line, *map(printable, traceback.splitlines())])
        return line


class LogHandler(logging.Handler):
    """Writes the records of `logging` to standard output. It blocks for at most MESSAGE_SECONDS, and never fails.

    Args:
        log_format: "json" or "text".
        output: where the lines are written.

    Attributes:
        lost: array whose element 0 counts the lines that are lost.
    """

    def __init__(self, log_format: str, output: LogOutput) -> None:
        super().__init__()
        self.setFormatter(Formatter(log_format))
        self.lost: SharedNumber = [0.0]
        self._log_format = log_format
        self.output = output
        self._unreported = 0  # lines that are lost and not reported in the log yet

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and before it the number of lines that were lost since the last one."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 - as in the handlers of `logging`, a wrong log call does not stop its caller
            self.handleError(record)
            return
        notice = _lost_notice(self._log_format, self._unreported) if self._unreported else b""
        try:
            self.output.write(notice + line, 0.0 if self._unreported else MESSAGE_SECONDS)
            self._unreported = 0
        except OSError:
            self._unreported += 1
            self.lost[0] += 1


def choose_format(log_format: str) -> str:
    """Return "json" or "text". If `log_format` is "auto", return "text" if standard output is a terminal."""
    if log_format != "auto":
        return log_format
    return "text" if os.isatty(STANDARD_OUTPUT) else "json"


def configure(level: str, log_format: str) -> None:
    """Send the log of this process to standard output.

    Args:
        level: the lowest level that is logged, as in ELBO_LOG_LEVEL.
        log_format: "auto", "json" or "text", as in ELBO_LOG_FORMAT.
    """
    handler = LogHandler(choose_format(log_format), LogOutput())
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())


def count_lost_messages(lost: SharedNumber) -> None:
    """Count the messages that are lost in element 0 of `lost`, including those that are lost already."""
    for handler in _log_handlers():
        lost[0] += handler.lost[0]
        handler.lost = lost


def _standard_output() -> LogOutput:
    """Return the output that the messages use, or a new one if `configure` was not called."""
    return next((handler.output for handler in _log_handlers()), LogOutput())


def _log_handlers() -> list[LogHandler]:
    return [handler for handler in logging.getLogger(LOGGERS[0]).handlers if isinstance(handler, LogHandler)]
