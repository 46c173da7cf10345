"""Call a server from Python.

    python examples/client.py http://127.0.0.1:8000    # a server that serves the model "web" of this script
    python examples/client.py                          # trains "web", and serves it on a free port

`elbo.client` needs neither torch nor the model: `pip install elbo polars` is enough where the first form runs.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from elbo.client import Client, Retries, TooManyRequests

NAMES = ["cpu", "latency", "errors"]


def metrics(rows: int, seed: int) -> pl.DataFrame:
    """Return normal rows of the metrics of a web server, [rows, 3]."""
    noise = np.random.RandomState(seed).standard_normal((rows, 3))
    values = np.array([50, 200, 3]) + noise @ np.array([[10, 25, 0], [0, 15, 0.2], [0, 0, 0.4]])
    return pl.DataFrame(values, schema=NAMES)


def call(address: str) -> None:
    """Use the server at `address`."""
    with Client(address, model="web", timeout=120, retries=Retries(attempts=60)) as elbo:  # wait until it is ready
        print("features:", *elbo.model().features)

        rows = metrics(5, seed=1).vstack(pl.DataFrame([[97.0, 900.0, 3.1]], schema=NAMES, orient="row"))
        verdicts = elbo.anomaly(rows, explain=1, observe=False)  # observe=False: raise no alert
        for each in verdicts.results:
            cause = f"{each.features[0].name}, expected {each.features[0].expected:.0f}" if each.is_anomaly else ""
            print(f"row {each.row}: p = {each.p_value:.3f} {cause}")

        latents = elbo.encode(rows).latents  # float32 [6, K]
        print("round trip:", np.abs(elbo.decode(latents).outputs - elbo.reconstruct(rows).outputs).max() < 1e-3)
        print("new rows like these:", elbo.sample(2, seed=7).outputs.round(1), sep="\n")

        live = (record for record in metrics(1000, seed=2).to_dicts())  # any iterator: it is read while verdicts arrive
        with elbo.anomaly_stream(live, observe=False, explain=0) as stream:
            alarms = sum(getattr(verdict, "is_anomaly", False) for verdict in stream)
        print(f"{alarms} alarms in 1000 normal rows")
        try:
            elbo.score(rows, observe=False, timeout=5)
        except TooManyRequests as error:  # raised after the last attempt
            print("the server is busy:", error)


@contextmanager
def own_server() -> Iterator[str]:
    """Train the model "web", serve it on a free port, and yield the address."""
    import elbo

    elbo.fit(metrics(2000, seed=0), kind="pca", name="web").save("artifacts")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "elbo", "serve", "--port", str(port), "--artifacts", "artifacts"]
    with Path("server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - a command of this script
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        call(sys.argv[1])
    else:
        with own_server() as own_address:
            call(own_address)
