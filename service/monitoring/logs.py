"""The log on standard output: one JSON object per line, or text for people.

A line that cannot be written, because the disk is full, the reader is blocked or standard output is closed, is counted
as lost. The server continues to serve, and to write later lines: see `service/monitoring/log_output.py`.
"""

import asyncio
import atexit
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from time import monotonic, perf_counter, time
from typing import Any

import orjson

from models.errors import printable, shortened
from service.monitoring.log_output import (
    FLUSH_SECONDS,
    STANDARD_ERROR,
    STANDARD_OUTPUT,
    LogOutput,
    LogQueue,
    QueuedText,
)
from service.monitoring.request_record import RequestRecord
from service.shared_memory import SharedNumber

LOGGERS = ("elbo", "uvicorn.error", "py.warnings")
ACCESS_LOGGER = "elbo.access"
FORMAT_BATCH = 32  # number of access records that are formatted together
MAX_LOGGED_PATH = 1000  # characters
MAX_LOGGED_CLIENT = 100  # characters; a proxy may pass on any text in X-Forwarded-For
COLLECT_SECONDS = 0.05  # access records are collected for this time, then formatted and queued together
LOST_LINES = "log lines were lost because standard output was blocked or failed; check its reader and the disk"
LOST_ON_STDERR = (
    "elbo: %d lines were lost because standard error was blocked or failed; check its reader and the disk\n"
)
_USUAL_LINE = (
    b'{"ts":"%b.%03d+00:00","level":"info","logger":"elbo.access","message":"request","request_id":%b,"method":%b,'
    b'"path":%b,"status":%d,"client":%b,"ms":%.3f%b}\n'
)
_USUAL_WORK = b',"model":%b,"version":%d,"rows":%d,"parse_ms":%.3f,"queue_ms":%.3f,"compute_ms":%.3f,"write_ms":%.3f'
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
    """The access log: one line per request. Lines are formatted in batches, after the responses have been sent.

    Args:
        log_format: "json" or "text".
        enabled: whether requests are logged.
        lines: the queue of the lines; by default, the queue that `configure` has created, or a new one for standard
            output.
    """

    def __init__(self, log_format: str, enabled: bool, lines: LogQueue | None = None) -> None:
        self._log_format = log_format
        self._enabled = enabled
        self.lines = lines or _configured_queue() or standard_output_queue(log_format)
        self._records: list[RequestRecord] = []  # not formatted yet
        self._formatted: list[bytes] = []  # lines that are not queued yet: queueing wakes the thread of the queue
        self._timer: asyncio.TimerHandle | None = None  # runs while records or lines wait to be queued
        self._second = 0  # Unix time of the last formatted line, in whole seconds
        self._time = b""  # this time as text

    def log(self, record: RequestRecord) -> None:
        """Log a request that has ended."""
        if not self._enabled:
            return
        self._records.append(record)
        if len(self._records) >= FORMAT_BATCH:
            self._format_records()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COLLECT_SECONDS, self._on_timer)

    async def close(self) -> None:
        """Wait until everything is written. If the reader is blocked, wait only for a moment."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._queue_lines()
        await asyncio.to_thread(self.lines.flush)

    def _on_timer(self) -> None:
        self._timer = None
        self._queue_lines()

    def _queue_lines(self) -> None:
        self._format_records()
        lines, self._formatted = self._formatted, []
        if lines:
            self.lines.put(b"".join(lines), len(lines))

    def _format_records(self) -> None:
        records, self._records = self._records, []
        clock_offset = time() - perf_counter()  # the time of a record plus this offset is a Unix time
        for record in records:
            seconds = clock_offset + record.started + record.total
            line = self._usual_line(record, seconds) if self._log_format == "json" else None
            self._formatted.append(line or _access_line(self._log_format, record, seconds))

    def _usual_line(self, record: RequestRecord, seconds: float) -> bytes | None:
        """Return the line of a request that a model has answered, or that no model has seen, such as a refused request.

        Return None if the line may need `format_line`. This takes 4 µs, and `format_line` 16 µs, most of them for the
        time, the dictionary and the rounding.
        """
        if record.key or not record.client or record.trace_id:
            return None
        if not record.compute and (record.model or not record.path.isascii() or not record.client.isascii()):
            return None
        if len(record.path) > MAX_LOGGED_PATH or len(record.client) > MAX_LOGGED_CLIENT:
            return None
        moment, milliseconds = divmod(round(seconds * 1e6) // 1000, 1000)  # rounded as by `datetime`
        if moment != self._second:
            self._second = moment
            self._time = datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").encode()[:-6]
        work = b""
        if record.compute:
            work = _USUAL_WORK % (
                orjson.dumps(record.model),
                record.version,
                record.rows,
                1e3 * record.parse,
                1e3 * record.queue,
                1e3 * record.compute,
                1e3 * record.write,
            )
        line = _USUAL_LINE % (
            self._time,
            milliseconds,
            orjson.dumps(record.request_id),
            orjson.dumps(record.method),
            orjson.dumps(record.path),
            record.status,
            orjson.dumps(record.client),
            1e3 * record.total,
            work,
        )
        return line if line.isascii() and b"\x7f" not in line else None


def _access_line(log_format: str, record: RequestRecord, seconds: float) -> bytes:
    """Return the line of any request, which has ended at the Unix time `seconds`."""
    return format_line(log_format, seconds, "INFO", ACCESS_LOGGER, "request", _access_fields(record))


def logged_path(path: str) -> str:
    """Return the path of a request as log lines show it."""
    return shortened(path, MAX_LOGGED_PATH)


def _access_fields(record: RequestRecord) -> dict[str, Any]:
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "client": record.client,
        "ms": round(record.total * 1e3, 3),
    }
    if len(record.path) > MAX_LOGGED_PATH:
        fields["path"] = logged_path(record.path)
    if record.client and len(record.client) > MAX_LOGGED_CLIENT:
        fields["client"] = shortened(record.client, MAX_LOGGED_CLIENT)
    if record.key:
        fields["key"] = record.key
    if record.trace_id:
        fields["trace_id"] = record.trace_id
    if record.model:
        fields |= {"model": record.model, "version": record.version, "rows": record.rows}
    if record.compute:
        fields["parse_ms"] = round(record.parse * 1e3, 3)
        fields["queue_ms"] = round(record.queue * 1e3, 3)
        fields["compute_ms"] = round(record.compute * 1e3, 3)
        fields["write_ms"] = round(record.write * 1e3, 3)
    return fields


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
    """Queues the records of `logging` as lines. It never blocks, and never fails.

    Args:
        log_format: "json" or "text".
        lines: the queue.
    """

    def __init__(self, log_format: str, lines: LogQueue) -> None:
        super().__init__()
        self.setFormatter(Formatter(log_format))
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 - as in the handlers of `logging`, a wrong log call does not stop its caller
            self.handleError(record)
            return
        self.lines.put(line)


def choose_format(log_format: str) -> str:
    """Return "json" or "text". If `log_format` is "auto", return "text" if standard output is a terminal."""
    if log_format != "auto":
        return log_format
    return "text" if os.isatty(STANDARD_OUTPUT) else "json"


def standard_output_queue(log_format: str) -> LogQueue:
    """Return a new queue in front of standard output. `log_format`: "json" or "text"."""

    def notice(lost: int) -> bytes:
        return format_line(log_format, time(), "WARNING", ACCESS_LOGGER, LOST_LINES, {"lost": lost})

    return LogQueue(notice, LogOutput(STANDARD_OUTPUT).write)


def configure(level: str, log_format: str) -> None:
    """Send the log of this process to standard output, through a queue.

    Args:
        level: the lowest level that is logged, as in ELBO_LOG_LEVEL. Libraries log only warnings and errors.
        log_format: "auto", "json" or "text", as in ELBO_LOG_FORMAT.
    """
    log_format = choose_format(log_format)
    handler = LogHandler(log_format, standard_output_queue(log_format))
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    libraries = logging.getLogger()
    libraries.handlers = [other for other in libraries.handlers if not isinstance(other, LogHandler)]
    libraries.addHandler(handler)


def redirect_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr`, so that this process never waits for a reader of what it prints.

    Tracebacks of a crash and the message of `sys.exit` pass through `sys.stderr`. The output of native code does not.
    """
    on_stdout = _configured_queue() or standard_output_queue("text")
    on_stderr = LogQueue(lambda lost: (LOST_ON_STDERR % lost).encode(), LogOutput(STANDARD_ERROR).write)
    sys.stdout = QueuedText(on_stdout, STANDARD_OUTPUT)
    sys.stderr = QueuedText(on_stderr, STANDARD_ERROR)
    os.register_at_fork(after_in_child=restart_after_fork)
    atexit.register(flush)  # Python calls `flush` after it has written the message of `sys.exit`


def flush() -> None:
    """Wait until everything that was logged or printed is written. Wait only a moment for a blocked reader."""
    for stream in _redirected_streams():
        stream.finish()
    deadline = monotonic() + FLUSH_SECONDS
    for lines in _queues():
        lines.flush(max(0.0, deadline - monotonic()))


def restart_after_fork() -> None:
    """Log through new queues in a process that has just been forked. The parent writes the lines of the old queues."""
    for stream in _redirected_streams():
        stream.restart_after_fork()
    for lines in _queues():
        lines.restart_after_fork()


def count_lost_lines(lost: SharedNumber) -> None:
    """Count lost lines in element 0 of `lost` from now on, and add the number of lines that are already lost."""
    for lines in _queues():
        lines.count_lost_in(lost)


def _queues() -> list[LogQueue]:
    queues = [_configured_queue(), *(stream.lines for stream in _redirected_streams())]
    return [lines for index, lines in enumerate(queues) if lines and lines not in queues[:index]]


def _redirected_streams() -> list[QueuedText]:
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, QueuedText)]


def _configured_queue() -> LogQueue | None:
    """Return the queue of the log, or None if `configure` was not called."""
    handlers = logging.getLogger(LOGGERS[0]).handlers
    return next((handler.lines for handler in handlers if isinstance(handler, LogHandler)), None)
