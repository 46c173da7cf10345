"""What the supervisor and a worker tell each other: a worker that it is ready, the supervisor all the rest.

Connections are passed on in the order of their arrival, and after the last comes the end of the stream: whoever has
read it has every connection that it will ever get. It comes too when the supervisor dies.
"""

import select
import socket
from collections.abc import Iterator

READY, CONNECTION, DRAIN = b"R", b"c", b"d"
BACKLOG = 2048  # connections that wait to be accepted
CLOSED = ("connections_closed",)  # the name of the number of connections that a worker has had and has no more
_MOST = 256  # letters and connections read at once


def announce(listener: socket.socket) -> str:
    """The URL of `listener`, for people."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait to be accepted now."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # its client has left, or there are too many open files: the next may do better
            return
        yield connection


def has_room(channel: socket.socket) -> bool:
    """Whether a connection can be passed on without waiting."""
    return bool(select.select([], [channel], [], 0)[1])


def pass_on(channel: socket.socket, connection: socket.socket) -> None:
    """Give `connection` away. Raises OSError if the worker is gone."""
    socket.send_fds(channel, [CONNECTION], [connection.fileno()])
    connection.close()


def received(channel: socket.socket) -> tuple[bytes, list[socket.socket]] | None:
    """What the supervisor has sent: its letters and the connections among them. None at the end. Does not wait.

    The kernel gives one connection at a time. If the worker took no more each time its event loop comes round, a
    thousand would wait for seconds while it is busy.
    """
    letters = b""
    connections: list[socket.socket] = []
    while len(letters) < _MOST:
        try:
            heard, numbers, _, _ = socket.recv_fds(channel, _MOST - len(letters), 1)
        except BlockingIOError:
            break
        if not heard:  # the end, which is still there the next time
            return (letters, connections) if letters else None
        letters += heard
        connections += [socket.socket(fileno=number) for number in numbers]
    return letters, connections
