"""An `elbo` program for shell scripts that starts without the import of torch, which takes two seconds of a core.

The program sends its arguments, environment, folder and standard streams to the process of the test. There, a thread
runs the command as `tests.preloaded` does, and returns its exit status.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.preloaded import PreloadedProcess

# -I and -S: this program needs only the standard library, and starts in a hundredth of a second.
PROGRAM = """#!{python} -IS
import json, os, socket, sys
to_test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
to_test.connect({address!r})
request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(to_test, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(to_test.recv(100) or 1))
"""


@contextmanager
def forked_elbo(folder: Path) -> Iterator[Path]:
    """Write the program `elbo` into `folder`, and run its commands until the block ends. Yield `folder`."""
    address = f"\0elbo {os.getpid()} {folder}"[:100]  # an abstract address: it is no file, and needs no clean-up
    program = folder / "elbo"
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        thread = threading.Thread(target=_run_commands, args=[listener])
        thread.start()
        try:
            yield folder
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _run_commands(listener: socket.socket) -> None:
    """Run commands until `listener` is shut down. Several commands may run at once, as in a pipeline of the shell."""
    threads = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        threads.append(threading.Thread(target=_run_command, args=[connection]))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _run_command(connection: socket.socket) -> None:
    with connection:
        content, files, _, _ = socket.recv_fds(connection, 2**20, 3)
        request = json.loads(content)
        command = [sys.executable, "-m", "elbo", *request["arguments"]]
        stdin, stdout, stderr = files
        try:
            process = PreloadedProcess(
                command, stdin=stdin, stdout=stdout, stderr=stderr,
                cwd=request["folder"], env=request["environment"],
            )  # fmt: skip
        finally:
            for file in files:
                os.close(file)
        status = process.wait()
        connection.send(str(status if status >= 0 else 128 - status).encode())
