"""Clients of an Elbo server, sync and async. They need httpx, NumPy and orjson, but neither torch nor an artifact.

from elbo.client import Client

with Client("http://127.0.0.1:8000", model="web") as elbo:
    verdicts = elbo.anomaly([{"cpu": 97, "latency": 900, "errors": 3}], observe=False)

`AsyncClient` has the same methods, to be awaited.
"""

from elbo.client.async_client import AsyncClient
from elbo.client.errors import (
    BadRequest,
    ConnectionFailed,
    ConnectTimedOut,
    ElboClientError,
    ElboHTTPError,
    InvalidReply,
    NotAuthorised,
    NotFound,
    NotReady,
    NotSupported,
    ServerError,
    ServerTimedOut,
    TimedOut,
    TooManyRequests,
)
from elbo.client.results import (
    BacktestReply,
    CalibrationScores,
    Contribution,
    Decoded,
    Encoded,
    FeedbackReply,
    HeldOut,
    Imputed,
    LatentPath,
    Model,
    Models,
    Neighbours,
    Peers,
    Reconstructed,
    RowError,
    Sampled,
    Scores,
    StreamSummary,
    Verdict,
    Verdicts,
)
from elbo.client.retries import Retries
from elbo.client.streams import AnomalyStream, AsyncAnomalyStream
from elbo.client.sync_client import Client

__all__ = [
    "AnomalyStream",
    "AsyncAnomalyStream",
    "AsyncClient",
    "BacktestReply",
    "BadRequest",
    "CalibrationScores",
    "Client",
    "ConnectTimedOut",
    "ConnectionFailed",
    "Contribution",
    "Decoded",
    "ElboClientError",
    "ElboHTTPError",
    "Encoded",
    "FeedbackReply",
    "HeldOut",
    "Imputed",
    "InvalidReply",
    "LatentPath",
    "Model",
    "Models",
    "Neighbours",
    "NotAuthorised",
    "NotFound",
    "NotReady",
    "NotSupported",
    "Peers",
    "Reconstructed",
    "Retries",
    "RowError",
    "Sampled",
    "Scores",
    "ServerError",
    "ServerTimedOut",
    "StreamSummary",
    "TimedOut",
    "TooManyRequests",
    "Verdict",
    "Verdicts",
]
