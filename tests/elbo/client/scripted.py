"""A server on a socket that answers each request as a test says, and counts the requests that it received."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Answer = Callable[[socket.socket], bool]  # writes an answer, and returns whether the connection stays open


class ScriptedServer:
    """A server that answers its n-th request with the n-th answer, and further requests with the last answer.

    `received` has the head and body of each complete request.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self.received: list[bytes] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while request := read_request(connection):
                with self._lock:
                    answer = self._answers[min(len(self.received), len(self._answers) - 1)]
                    self.received.append(request)
                if not answer(connection):
                    return

    def close(self) -> None:
        """Close the listener and all connections."""
        self._listener.close()
        for connection in self._connections:
            connection.close()


@contextmanager
def scripted(*answers: Answer) -> Iterator[ScriptedServer]:
    """Run a server that answers as `answers` say, until the block ends."""
    server = ScriptedServer(answers)
    try:
        yield server
    finally:
        server.close()


def read_request(connection: socket.socket) -> bytes:
    """Return one request with a Content-Length; b"" if the client closes the connection before its end."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
        head, end, body = data.partition(b"\r\n\r\n")
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if end and len(body) >= (lengths[0] if lengths else 0):
            return data
    return b""


def respond(status: str, body: bytes, *headers: str) -> Answer:
    """Return an answer with this status, body and headers. The connection stays open."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]

    def answer(connection: socket.socket) -> bool:
        connection.sendall("\r\n".join(lines).encode() + body)
        return True

    return answer


def respond_raw(data: bytes) -> Answer:
    """Return an answer that sends `data`, and closes the connection."""

    def answer(connection: socket.socket) -> bool:
        connection.sendall(data)
        return False

    return answer


def hang_up(_connection: socket.socket) -> bool:
    """Close the connection without an answer."""
    return False


def wait(seconds: float) -> Answer:
    """Return an answer that sends nothing for `seconds`, and closes the connection."""

    def answer(_connection: socket.socket) -> bool:
        time.sleep(seconds)
        return False

    return answer
