"""A table with categories, drawn from a known distribution, for tests."""

import numpy as np
import polars as pl

SHARES = {"tcp": 0.6, "udp": 0.3, "icmp": 0.1}
CPU = {"tcp": 20.0, "udp": 50.0, "icmp": 80.0}  # mean of the numbers, given the level
KNOWN = {"cpu": 20.0, "mem": 10.0, "secure": True, "count": 4, "protocol": "tcp", "zone": "Zürich=a"}


def mixed_frame(rows: int, seed: int = 0) -> pl.DataFrame:
    """Return a table of numbers, whole numbers, booleans and two categories. cpu and mem depend on the protocol."""
    random = np.random.RandomState(seed)
    protocol = random.choice(list(SHARES), rows, p=list(SHARES.values()))
    cpu = np.array([CPU[level] for level in protocol]) + 3.0 * random.randn(rows)
    return pl.DataFrame(
        {
            "cpu": cpu,
            "protocol": protocol,
            "mem": 0.5 * cpu + 2.0 * random.randn(rows),
            "zone": random.choice(["Zürich=a", "b c", "日本"], rows),
            "secure": random.rand(rows) < 0.4,
            "count": random.poisson(4.0, rows),
        }
    )
