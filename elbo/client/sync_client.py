"""The client for programs that wait for each response."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import httpx
import numpy.typing as npt

from elbo.client import calls, results
from elbo.client.calls import Call, Options
from elbo.client.connections import SocketTransport
from elbo.client.errors import NotFound, NotReady
from elbo.client.http1 import Received
from elbo.client.options import (
    AnomalyOptions,
    BacktestOptions,
    CallOptions,
    EditOptions,
    EncodeOptions,
    FeedbackOptions,
    NeighbourOptions,
    PathOptions,
    PeersOptions,
    RowOptions,
    SampleOptions,
    ScoreOptions,
    StreamOptions,
)
from elbo.client.results import Array
from elbo.client.retries import Retries
from elbo.client.rows import Frame, Record, Rows, is_frame, is_records, only_features, to_array, to_ordered_array
from elbo.client.settings import (
    CHUNK_ROWS,
    DEFAULT_TIMEOUT,
    Settings,
    Verify,
    proxy_of,
    received,
    refusal,
    result,
    ssl_context_of,
)
from elbo.client.streams import AnomalyStream

T = TypeVar("T")
R = TypeVar("R", bound=results.Reply)


class Client:
    """A client of an Elbo server. It keeps its connections open, and threads may share it.

    Rows are arrays [N, D] (NumPy, PyTorch, lists), data frames of pandas or polars, or records: lists of objects by
    feature name. The columns of frames and records may be in any order. Columns that are not features are ignored,
    except for the time, the group and the conditions in `anomaly`, `anomaly_stream`, `feedback` and `backtest`.
    `impute` refuses them.

    Every method raises the exceptions of `elbo.client.errors`, and TypeError or ValueError for unusable arguments.

    Args:
        base_url: address of the server, such as "http://127.0.0.1:8000". It may have a path.
        model: the model of all calls: name or name@version; by default the server's default model.
        key: the API key.
        timeout: seconds for each call, with all its requests and attempts; None for no limit. The server gets the
            limit, too, and stops computing when it has passed. A call sends more than one request if an array has more
            than `chunk_rows` rows, and if the client has to ask for the features or the name of the model.
        retries: how often and how fast requests are repeated.
        verify: True to verify the server's certificate, False not to, or an SSL context, as in httpx.
        cert: the client's certificate, as in httpx.
        trust_env: whether HTTP_PROXY, NO_PROXY, SSL_CERT_FILE and similar variables apply, as in httpx.
        transport: a transport of httpx, instead of the client's own; for example, httpx.HTTPTransport(uds=...).
        headers: headers to add to every request.
        chunk_rows: arrays with more rows are sent in several requests, at most this many rows each. It must not be
            above the server's ELBO_MAX_ROWS.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        verify: Verify = True,
        cert: Any = None,
        trust_env: bool = True,
        transport: httpx.BaseTransport | None = None,
        headers: Mapping[str, str] | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self._settings = Settings(base_url, model, key, timeout, retries, headers, chunk_rows)
        self._transport: httpx.BaseTransport | SocketTransport
        if transport is not None:
            self._transport = transport
            return
        context = ssl_context_of(base_url, verify, cert, trust_env)
        if proxy := proxy_of(base_url, trust_env):
            verified: Verify = context or verify
            self._transport = httpx.HTTPTransport(verify=verified, proxy=proxy, trust_env=trust_env)
        else:
            self._transport = SocketTransport(context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    # Rows and latents

    def encode(self, rows: Rows, **options: Unpack[EncodeOptions]) -> results.Encoded:
        """Return the latents [N, K] of rows [N, D], and their posterior standard deviations."""
        return self._by_row(calls.encode, rows, options)

    def decode(self, latents: npt.ArrayLike, **options: Unpack[RowOptions]) -> results.Decoded:
        """Return the rows [N, D] of latents [N, K]."""
        return self._in_parts(calls.decode, to_array(latents), options)

    def reconstruct(self, rows: Rows, **options: Unpack[RowOptions]) -> results.Reconstructed:
        """Return the reconstructions [N, D] of rows, and the mean squared error [N] of each row."""
        return self._by_row(calls.reconstruct, rows, options)

    def sample(self, n: int = 1, **options: Unpack[SampleOptions]) -> results.Sampled:
        """Return `n` new rows: from the prior, near a row (`near`), or with given values (`given`)."""
        return self._send(calls.sample(n, self._model(options), options), options)

    def interpolate(self, start: Any, end: Any, **options: Unpack[PathOptions]) -> results.LatentPath:
        """Return rows on the path between two ends. An end is a row [D], or {"latent": vector}."""
        return self._send(calls.interpolate(start, end, self._model(options), options), options)

    def edit(self, point: Any, direction: str, **options: Unpack[EditOptions]) -> results.LatentPath:
        """Return a row moved towards the label `direction`. `point` is a row [D], or {"latent": vector}."""
        return self._send(calls.edit(point, direction, self._model(options), options), options)

    def impute(self, rows: Rows, **options: Unpack[CallOptions]) -> results.Imputed:
        """Return rows with estimates of their missing values (NaN, None, absent), and the uncertainty of each value.

        Columns of a data frame that are not features, such as a timestamp, are ignored.
        """
        within, reference = self._settings.with_deadline(options), self._model(options)
        if is_frame(rows):
            known = self._described(reference, within)
            rows, reference = only_features(rows, known.features, known.name), f"{known.name}@{known.version}"
        if is_frame(rows) or is_records(rows):
            return self._send(calls.impute(rows, reference, within), within)
        return self._in_parts(calls.impute, to_array(rows), within)

    def neighbours(
        self,
        rows: Rows | None = None,
        *,
        latents: npt.ArrayLike | None = None,
        **options: Unpack[NeighbourOptions],
    ) -> results.Neighbours:
        """Return the held-out rows that are nearest to each of `rows` [N, D], or of `latents` [N, K]."""
        vectors, within = None if latents is None else to_array(latents), self._settings.with_deadline(options)

        def send(array: Array | None, model: str | None) -> results.Neighbours:
            return self._send(calls.neighbours(array, vectors, model, within), within)

        if rows is None:
            return send(None, self._model(options))
        return self._named(rows, within, send)

    # Anomalies

    def anomaly(self, rows: Rows, **options: Unpack[AnomalyOptions]) -> results.Verdicts:
        """Return the verdict on each row, and the features that contribute most.

        Unless `observe=False`, the rows can be live traffic, which raises alerts: the request is never sent twice.
        """
        return self._send(calls.anomaly(rows, self._model(options), options), options)

    def score(self, rows: Rows, **options: Unpack[ScoreOptions]) -> results.Scores:
        """Return the score, the p-value and the severity of each row as arrays, which is faster than `anomaly`.

        Unless `observe=False`, the rows can be live traffic, as in `anomaly`.
        """
        return self._by_row(calls.score, rows, options)

    def anomaly_stream(
        self, rows: Iterable[Record | Sequence[float | None]], *, ahead: int = 1024, **options: Unpack[StreamOptions]
    ) -> AnomalyStream:
        """Return an iterator over the verdicts on `rows`, in their order, while `rows` is read.

        A row is an object by feature name, or a list of numbers. `rows` is never read more than `ahead` rows before the
        verdicts that were taken from the iterator. With `ahead=1`, each verdict arrives before the next row is read,
        as a live source of rows needs. `timeout` is the longest time in seconds without progress.

        Raises:
            TypeError: the client has a proxy or a transport of its own, which cannot read while it writes.
        """
        if not isinstance(self._transport, SocketTransport):
            raise TypeError(
                "a stream needs a direct connection: create the client without transport= and without proxy"
            )
        path = calls.stream_path(self._model(options), options)
        seconds = options.get("timeout", self._settings.timeout)
        return AnomalyStream(self._settings, self._transport, path, rows, ahead, seconds)

    def feedback(
        self,
        verdict: Literal["normal", "incident"],
        rows: Frame | Sequence[Record] | None = None,
        **options: Unpack[FeedbackOptions],
    ) -> results.FeedbackReply:
        """Report that rows were normal, or an incident: their scores enter or leave the calibration of their group.

        The request is never sent twice.
        """
        return self._send(calls.feedback(verdict, rows, self._model(options), options), options)

    def backtest(self, rows: Frame | Sequence[Record], **options: Unpack[BacktestOptions]) -> results.BacktestReply:
        """Return the alerts that a history would have raised. The rows have a time and perhaps a group."""
        return self._send(calls.backtest(rows, self._model(options), options), options)

    def peers(self, **options: Unpack[PeersOptions]) -> results.Peers:
        """Return how the newest rows of each group differ from those of the other groups."""
        return self._send(calls.peers(self._reference(options), options), options)

    # The server and its models

    def models(self, **options: Unpack[CallOptions]) -> results.Models:
        """Return the models that are served."""
        return self._send(calls.models(), options)

    def model(self, reference: str | None = None, **options: Unpack[CallOptions]) -> results.Model:
        """Return the model version that `reference` names, with its features; by default, the model of the client."""
        return self._send(calls.model(reference or self._reference(options)), options)

    def card(self, **options: Unpack[CallOptions]) -> str:
        """Return the model card, in Markdown."""
        return self._send(calls.card(self._reference(options)), options)

    def held_out(self, **options: Unpack[CallOptions]) -> results.HeldOut:
        """Return the held-out rows in the artifact, and their latents."""
        return self._send(calls.held_out(self._reference(options)), options)

    def calibration(self, **options: Unpack[CallOptions]) -> results.CalibrationScores:
        """Return the scores of the calibration set."""
        return self._send(calls.calibration(self._reference(options)), options)

    def health(self, **options: Unpack[CallOptions]) -> bool:
        """Return True if the server runs. Raises ConnectionFailed or TimedOut if it does not respond."""
        return self._send(calls.probe("/livez"), options)

    def ready(self, **options: Unpack[CallOptions]) -> bool:
        """Return whether the server accepts requests: it serves a model, and is not shutting down."""
        try:
            return self._send(calls.probe("/readyz"), options)
        except NotReady:
            return False

    # How calls are sent

    def _model(self, options: Options) -> str | None:
        model: str | None = options.get("model", self._settings.model)
        return model

    def _reference(self, options: Options) -> str:
        """Return the model of a call as name or name@version. Raises NotReady if the server has no default model."""
        reference = self._model(options) or self._send(calls.models(), options).default
        if reference is None:
            raise NotReady(503, "not_ready", "the server has no default model: pass model=...")
        return reference

    def _send(self, call: Call[T], options: Options) -> T:
        """Send `call`, again after failures that may pass, and return its result."""
        attempts = self._settings.attempts(call, options)
        while True:
            try:
                response = self._exchange(call, attempts.seconds_for_request())
            except httpx.TransportError as error:
                wait = attempts.wait_after_failure(error)
            else:
                if response.status == 200:
                    return result(call, response)
                wait = attempts.wait_after_refusal(refusal(response))
            time.sleep(wait)

    def _exchange(self, call: Call[Any], seconds: float | None) -> Received:
        """Send `call` once, and return the response. Without httpx's objects, the client's own transport is faster."""
        if isinstance(self._transport, SocketTransport):
            head = self._settings.head(call, seconds)
            return self._transport.exchange(self._settings.origin, head, call.body or b"", seconds).received()
        response = self._transport.handle_request(self._settings.request(call, seconds))
        response.read()
        return received(response)

    def _by_row(self, make: Callable[[Array, str | None, Options], Call[R]], rows: Rows, options: Options) -> R:
        """Return the result for `rows`, which the server computes independently of each other."""
        options = self._settings.with_deadline(options)
        return self._named(
            rows, options, lambda array, pinned: self._in_parts(make, array, {**options, "model": pinned})
        )

    def _named(self, rows: Rows, options: Options, send: Callable[[Array, str | None], R]) -> R:
        """Return what `send` returns for the array [N, D] of `rows` and the model to ask.

        The columns of frames and records are put into the order of the features of one version. `send` gets this
        version as name@version, because another version may have another order.
        """
        reference = self._model(options)
        if not (is_frame(rows) or is_records(rows)):
            return send(to_array(rows), reference)
        known = self._described(reference, options)
        array = to_ordered_array(rows, known)
        try:
            return send(array, f"{known.name}@{known.version}")
        except NotFound:
            if not self._settings.forget(reference):
                raise
        known = self._described(reference, options)  # the version that was remembered is no longer served
        return send(to_ordered_array(rows, known), f"{known.name}@{known.version}")

    def _described(self, reference: str | None, options: Options) -> results.Model:
        known = self._settings.remembered(reference)
        if known is None:
            known = self._send(calls.model(self._reference(options)), options)
            self._settings.remember(reference, known)
        return known

    def _in_parts(self, make: Callable[[Array, str | None, Options], Call[R]], array: Array, options: Options) -> R:
        """Return the result for `array`, from one request for each part of its rows. One version computes all parts."""
        model, parts = self._model(options), []
        if len(array) <= self._settings.chunk_rows:
            return self._send(make(array, model, options), options)
        options = self._settings.with_deadline(options)
        for part, part_options in self._settings.parts(array, options):
            parts.append(self._send(make(part, model, part_options), options))
            model = f"{parts[0].model}@{parts[0].version}"
        return calls.joined(parts)
