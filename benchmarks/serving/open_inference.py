"""Measure the rate of the Open Inference Protocol's binary form against npy: rows to encode, on one connection.

    python benchmarks/serving/open_inference.py
    python benchmarks/serving/open_inference.py --smoke    # a few requests

Both requests carry the same rows, and both responses the same latents. They are sent in turns over one connection, so
that changes in the machine's speed affect both alike. The client sends prepared bytes and only finds the end of each
response, so almost all of the time is the server's. The benchmark prints a Markdown table of medians.
"""

import argparse
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import orjson

from benchmarks.serving.client_speed import wait_until_ready
from benchmarks.serving.server_process import ServerProcess, free_port
from benchmarks.serving.workload import create_workload
from elbo.client.formats import NPY, dump_npy

ROWS = (1, 32, 256)
Array = npt.NDArray[np.float32]


def http_request(path: str, headers: dict[str, str], body: bytes) -> bytes:
    """Return a POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def npy_request(rows: Array) -> bytes:
    """Return the request to /encode with npy in both directions."""
    return http_request("/encode?model=vae", {"Content-Type": NPY, "Accept": NPY}, dump_npy(rows))


def protocol_request(rows: Array) -> bytes:
    """Return the same request in the Open Inference Protocol, with binary numbers in both directions."""
    tensor = {
        "name": "x", "shape": rows.shape, "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes},
    }  # fmt: skip
    head = orjson.dumps({"inputs": [tensor], "outputs": [{"name": "mean", "parameters": {"binary_data": True}}]})
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return http_request("/v2/models/vae/infer", headers, head + rows.tobytes())


def send(connection: socket.socket, request: bytes) -> bytes:
    """Send `request` and return the body of the response. Raises RuntimeError if its status is not 200."""
    connection.sendall(request)
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += connection.recv(2**18)
    head = bytes(received[:end]).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.partition(b"\r\n")[0].decode())
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(received) < end + 4 + length:
        received += connection.recv(2**18)
    return bytes(received[end + 4 :])


def compare(port: int, rows: Array, rounds: int) -> tuple[float, float, float]:
    """Return the median times of npy and of the protocol in ms, and the median ratio of their times in a round."""
    requests = npy_request(rows), protocol_request(rows)
    seconds: tuple[list[float], list[float]] = [], []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = len(send(connection, requests[0])) - 128  # without the header of the npy file
        npy_latents, latents = (send(connection, request)[-size:] for request in requests)
        assert npy_latents == latents, "the two responses differ"
        for _ in range(rounds):
            for request, times in zip(requests, seconds, strict=True):
                started = perf_counter()
                send(connection, request)
                times.append(perf_counter() - started)
    npy, protocol = (1e3 * statistics.median(times) for times in seconds)
    return npy, protocol, statistics.median(a / b for a, b in zip(*seconds, strict=True))


def main() -> None:
    """Train a model, start a server, and compare the two formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few requests, to check that the benchmark works")
    parser.add_argument("--rounds", type=int, default=2000, help="requests of each kind per table row (default 2000)")
    options = parser.parse_args()
    rounds = 20 if options.smoke else options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        workload = create_workload(folder)
        environment = {"ELBO_ARTIFACTS": str(folder / "artifacts"), "ELBO_PORT": str(port), "ELBO_LOG_LEVEL": "error"}
        with ServerProcess([sys.executable, "-m", "service"], environment, folder / "server.log") as server:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            print("| rows of 784 | npy, ms | Open Inference Protocol, ms | rate relative to npy |\n|---|---|---|---|")
            for rows in ROWS:
                npy, protocol, ratio = compare(port, workload.rows[rows], rounds)
                print(f"| {rows} | {npy:.3f} | {protocol:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
