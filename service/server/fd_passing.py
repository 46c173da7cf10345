"""The protocol between the supervisor and a worker, over a Unix socket pair: one byte per message.

The worker sends READY when it can serve. The supervisor sends DRAIN when the server begins to stop, and RELOAD when it
has received SIGHUP. With each accepted connection, it sends CONNECTION and the file descriptor. With each SHED, it asks
the worker to let one client reconnect. Messages arrive in the order in which they were sent. After the last connection,
the supervisor ends the stream. The stream also ends when the supervisor dies.
"""

import ctypes
import errno
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

READY = b"R"
CONNECTION = b"c"
DRAIN = b"d"
RELOAD = b"r"
SHED = b"s"
# Connections that the kernel keeps until they are accepted; Linux keeps at most net.core.somaxconn, usually 4096. If
# there are more, the kernel drops what a client sends, and the client sends it again after 1, 3 and 7 s.
BACKLOG = 16384
CLOSED_CONNECTIONS = ("connections_closed",)  # key under which a worker counts the connections it has closed
HANDSHAKE_SECONDS = 0.1  # time for a handshake that has begun to complete, before the listener is closed
_SO_ATTACH_FILTER = 26  # Linux, include/uapi/asm-generic/socket.h; Python has no name for it
# Program of the classic Berkeley packet filter: drop each packet with the SYN flag, which begins a new connection.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load byte 13 of the TCP header, which holds the flags
    (0x45, 0, 1, 0x02),  # skip one instruction unless SYN is set
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # accept the packet
)
# Errors of `accept` when the process or the machine has too few files or too little memory. The connection stays in the
# backlog. A caller must not try again at once, because that would be a busy loop.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_MAX_MESSAGES = 256  # maximum number of messages that one call of `receive` reads


class Received(NamedTuple):
    """Messages from the supervisor, and the connections that arrived with the messages."""

    messages: bytes
    connections: list[socket.socket]

    @property
    def lost(self) -> int:
        """The number of connections that the kernel has closed, because this process has too many open files."""
        return self.messages.count(CONNECTION) - len(self.connections)


def url_of(listener: socket.socket, is_https: bool) -> str:
    """Return the URL at which `listener` is reached."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if is_https else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def accept(listener: socket.socket) -> socket.socket | None:
    """Return a connection that waits in the backlog of a non-blocking listener, or None if none waits.

    Raises:
        OSError: no file or memory is left for the connection. It stays in the backlog.
    """
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            if error.errno in (errno.EBADF, errno.EINVAL):  # the listener is closed or does not listen
                return None
            # Otherwise a client has disconnected before its connection was accepted.


def has_pending(listener: socket.socket) -> bool:
    """Return whether a connection waits in the backlog of a listener."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def accept_pending(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that wait in the backlog of a non-blocking listener, until no file is left for another."""
    with suppress(OSError):
        while connection := accept(listener):
            yield connection


def stop_new_connections(listener: socket.socket) -> None:
    """Let no new connection reach `listener`, which still accepts those whose handshake has begun. Linux only.

    When a listener is closed, the kernel resets the connections that nobody has accepted yet. Without this filter a
    client could connect and send a request between the last `accept` and the close, and the request would be lost. The
    kernel of a client whose packet is dropped sends it again after a second, when the listener is closed: that client
    is refused before it sends a request.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in _DROP_SYN))
    with suppress(OSError):  # a system without this filter closes the listener, which rarely loses a connection
        pointer = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(program))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)


def can_send(control: socket.socket) -> bool:
    """Return whether a connection can be sent to the worker without blocking."""
    _, writable, _ = select.select([], [control], [], 0)
    return bool(writable)


def send_connection(control: socket.socket, connection: socket.socket) -> None:
    """Give `connection` to the worker and close it here. Raises OSError if the worker is gone."""
    socket.send_fds(control, [CONNECTION], [connection.fileno()])
    connection.close()


def receive(control: socket.socket) -> Received | None:
    """Return what the supervisor has sent so far, or None at the end of the stream. The call does not wait.

    Each message with a file descriptor needs a separate read, so one call makes many reads. If each pass of the event
    loop made only one read, a thousand new connections would wait for seconds in a busy worker.
    """
    messages = b""
    connections: list[socket.socket] = []
    while len(messages) < _MAX_MESSAGES:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, _MAX_MESSAGES - len(messages), 1)
        except BlockingIOError:
            break
        if not data:  # end of the stream: return the messages of this call; the next call returns None
            return Received(messages, connections) if messages else None
        messages += data
        connections += [socket.socket(fileno=descriptor) for descriptor in descriptors]
    return Received(messages, connections)
