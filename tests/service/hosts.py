"""The training table of the `hosts` model, and its rows in the formats that /anomaly reads."""

import json
from typing import Any

import httpx
import numpy as np

from training.data.row_store import RowStore
from training.data.table import Table

HOST_FEATURES = ["cpu", "memory/used", "disk~io", "load"]
JSON = "application/json"
NDJSON = "application/x-ndjson"

RowList = list[list[float]]
Message = tuple[bytes, str]  # request body, media type


def host_table() -> Table:
    """Return 400 rows of four features; `disk~io` is the sum of `cpu` and a rescaled `memory/used`."""
    rng = np.random.default_rng(5)
    base = rng.normal(size=(400, 2))
    x = np.column_stack((base[:, 0], 100 + 20 * base[:, 1], base[:, 0] + base[:, 1], 3 * rng.normal(size=400)))
    return Table(
        RowStore(x.astype(np.float32)),
        (4,),
        HOST_FEATURES,
        ["%", "MB", None, None],
        None,
        None,
        "made up",
        missing=np.zeros(4, np.int64),
    )


def host_rows(count: int) -> RowList:
    """Return the first `count` rows of the host table; after 400 rows the table repeats."""
    return [[float(value) for value in row] for row in np.resize(host_table().x.read_range(0, 400), (count, 4))]


def host_records(rows: RowList) -> list[dict[str, float]]:
    """Return each row as a dictionary from feature name to value."""
    return [dict(zip(HOST_FEATURES, row, strict=True)) for row in rows]


def as_inputs(rows: RowList) -> Message:
    """Encode rows as the JSON field `inputs`."""
    return json.dumps({"inputs": rows}).encode(), JSON


def as_ndjson(rows: RowList) -> Message:
    """Encode rows as NDJSON, one object per line."""
    return "\n".join(map(json.dumps, host_records(rows))).encode(), NDJSON


def post_anomaly(client: httpx.Client, message: Message, query: str = "") -> dict[str, Any]:
    """POST `message` to /anomaly, assert that it succeeds, and return the JSON response."""
    body, media_type = message
    response = client.post(f"/anomaly{query}", content=body, headers={"content-type": media_type})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content
