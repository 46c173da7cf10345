"""The client for programs with asyncio."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack

import httpx
import numpy.typing as npt

from elbo.client import calls, results
from elbo.client.calls import Call, Options
from elbo.client.connections import MAX_CONNECTIONS, AsyncSocketTransport
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
from elbo.client.streams import AsyncAnomalyStream

T = TypeVar("T")
R = TypeVar("R", bound=results.Reply)


class AsyncClient:
    """A client of an Elbo server for programs with asyncio. It has the methods and the arguments of `Client`.

    Args:
        base_url: address of the server.
        model: the model of all calls.
        key: the API key.
        timeout: seconds for each call, with all its requests and attempts; None for no limit.
        retries: how often and how fast requests are repeated.
        verify: how to verify the server's certificate, as in httpx.
        cert: the client's certificate, as in httpx.
        trust_env: whether HTTP_PROXY, NO_PROXY, SSL_CERT_FILE and similar variables apply, as in httpx.
        transport: an async transport of httpx, instead of the client's own. With trio, pass httpx.AsyncHTTPTransport().
        headers: headers to add to every request.
        max_connections: most requests at a time, not counting streams; further requests wait.
        chunk_rows: arrays with more rows are sent in several requests, at most this many rows each.
        concurrency: most requests at a time for one such array.
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
        transport: httpx.AsyncBaseTransport | None = None,
        headers: Mapping[str, str] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        chunk_rows: int = CHUNK_ROWS,
        concurrency: int = 4,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        self._concurrency = concurrency
        self._settings = Settings(base_url, model, key, timeout, retries, headers, chunk_rows)
        self._transport: httpx.AsyncBaseTransport | AsyncSocketTransport
        if transport is not None:
            self._transport = transport
            return
        context = ssl_context_of(base_url, verify, cert, trust_env)
        if proxy := proxy_of(base_url, trust_env):
            verified: Verify = context or verify
            self._transport = httpx.AsyncHTTPTransport(verify=verified, proxy=proxy, trust_env=trust_env)
        else:
            self._transport = AsyncSocketTransport(context, max_connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    # Rows and latents

    async def encode(self, rows: Rows, **options: Unpack[EncodeOptions]) -> results.Encoded:
        """Return the latents [N, K] of rows [N, D], and their posterior standard deviations."""
        return await self._by_row(calls.encode, rows, options)

    async def decode(self, latents: npt.ArrayLike, **options: Unpack[RowOptions]) -> results.Decoded:
        """Return the rows [N, D] of latents [N, K]."""
        return await self._in_parts(calls.decode, to_array(latents), options)

    async def reconstruct(self, rows: Rows, **options: Unpack[RowOptions]) -> results.Reconstructed:
        """Return the reconstructions [N, D] of rows, and the mean squared error [N] of each row."""
        return await self._by_row(calls.reconstruct, rows, options)

    async def sample(self, n: int = 1, **options: Unpack[SampleOptions]) -> results.Sampled:
        """Return `n` new rows: from the prior, near a row (`near`), or with given values (`given`)."""
        return await self._send(calls.sample(n, self._model(options), options), options)

    async def interpolate(self, start: Any, end: Any, **options: Unpack[PathOptions]) -> results.LatentPath:
        """Return rows on the path between two ends. An end is a row [D], or {"latent": vector}."""
        return await self._send(calls.interpolate(start, end, self._model(options), options), options)

    async def edit(self, point: Any, direction: str, **options: Unpack[EditOptions]) -> results.LatentPath:
        """Return a row moved towards the label `direction`. `point` is a row [D], or {"latent": vector}."""
        return await self._send(calls.edit(point, direction, self._model(options), options), options)

    async def impute(self, rows: Rows, **options: Unpack[CallOptions]) -> results.Imputed:
        """Return rows with estimates of their missing values (NaN, None, absent), and the uncertainty of each value.

        Columns of a data frame that are not features, such as a timestamp, are ignored.
        """
        within, reference = self._settings.with_deadline(options), self._model(options)
        if is_frame(rows):
            known = await self._described(reference, within)
            rows, reference = only_features(rows, known.features, known.name), f"{known.name}@{known.version}"
        if is_frame(rows) or is_records(rows):
            return await self._send(calls.impute(rows, reference, within), within)
        return await self._in_parts(calls.impute, to_array(rows), within)

    async def neighbours(
        self,
        rows: Rows | None = None,
        *,
        latents: npt.ArrayLike | None = None,
        **options: Unpack[NeighbourOptions],
    ) -> results.Neighbours:
        """Return the held-out rows that are nearest to each of `rows` [N, D], or of `latents` [N, K]."""
        vectors, within = None if latents is None else to_array(latents), self._settings.with_deadline(options)

        def send(array: Array | None, model: str | None) -> Awaitable[results.Neighbours]:
            return self._send(calls.neighbours(array, vectors, model, within), within)

        if rows is None:
            return await send(None, self._model(options))
        return await self._named(rows, within, send)

    # Anomalies

    async def anomaly(self, rows: Rows, **options: Unpack[AnomalyOptions]) -> results.Verdicts:
        """Return the verdict on each row, and the features that contribute most.

        Unless `observe=False`, the rows can be live traffic, which raises alerts: the request is never sent twice.
        """
        return await self._send(calls.anomaly(rows, self._model(options), options), options)

    async def score(self, rows: Rows, **options: Unpack[ScoreOptions]) -> results.Scores:
        """Return the score, the p-value and the severity of each row as arrays, which is faster than `anomaly`.

        Unless `observe=False`, the rows can be live traffic, as in `anomaly`.
        """
        return await self._by_row(calls.score, rows, options)

    def anomaly_stream(
        self,
        rows: Iterable[Record | Sequence[float | None]] | AsyncIterable[Record | Sequence[float | None]],
        *,
        ahead: int = 1024,
        **options: Unpack[StreamOptions],
    ) -> AsyncAnomalyStream:
        """Return an iterator over the verdicts on `rows`, in their order, while `rows` is read.

        A row is an object by feature name, or a list of numbers. `rows` is never read more than `ahead` rows before the
        verdicts that were taken from the iterator. An async iterable is read while the program awaits verdicts, so the
        verdict on a row of a live source arrives at once. Other iterators are read in a thread, so that a slow one does
        not block the event loop. `timeout` is the longest wait in seconds for a verdict.

        Raises:
            TypeError: the client has a proxy or a transport of its own, which cannot read while it writes.
        """
        if not isinstance(self._transport, AsyncSocketTransport):
            raise TypeError(
                "a stream needs a direct connection: create the client without transport= and without proxy"
            )
        path = calls.stream_path(self._model(options), options)
        seconds = options.get("timeout", self._settings.timeout)
        return AsyncAnomalyStream(self._settings, self._transport, path, rows, ahead, seconds)

    async def feedback(
        self,
        verdict: Literal["normal", "incident"],
        rows: Frame | Sequence[Record] | None = None,
        **options: Unpack[FeedbackOptions],
    ) -> results.FeedbackReply:
        """Report that rows were normal, or an incident: their scores enter or leave the calibration of their group.

        The request is never sent twice.
        """
        return await self._send(calls.feedback(verdict, rows, self._model(options), options), options)

    async def backtest(
        self, rows: Frame | Sequence[Record], **options: Unpack[BacktestOptions]
    ) -> results.BacktestReply:
        """Return the alerts that a history would have raised. The rows have a time and perhaps a group."""
        return await self._send(calls.backtest(rows, self._model(options), options), options)

    async def peers(self, **options: Unpack[PeersOptions]) -> results.Peers:
        """Return how the newest rows of each group differ from those of the other groups."""
        return await self._send(calls.peers(await self._reference(options), options), options)

    # The server and its models

    async def models(self, **options: Unpack[CallOptions]) -> results.Models:
        """Return the models that are served."""
        return await self._send(calls.models(), options)

    async def model(self, reference: str | None = None, **options: Unpack[CallOptions]) -> results.Model:
        """Return the model version that `reference` names, with its features; by default, the model of the client."""
        return await self._send(calls.model(reference or await self._reference(options)), options)

    async def card(self, **options: Unpack[CallOptions]) -> str:
        """Return the model card, in Markdown."""
        return await self._send(calls.card(await self._reference(options)), options)

    async def held_out(self, **options: Unpack[CallOptions]) -> results.HeldOut:
        """Return the held-out rows in the artifact, and their latents."""
        return await self._send(calls.held_out(await self._reference(options)), options)

    async def calibration(self, **options: Unpack[CallOptions]) -> results.CalibrationScores:
        """Return the scores of the calibration set."""
        return await self._send(calls.calibration(await self._reference(options)), options)

    async def health(self, **options: Unpack[CallOptions]) -> bool:
        """Return True if the server runs. Raises ConnectionFailed or TimedOut if it does not respond."""
        return await self._send(calls.probe("/livez"), options)

    async def ready(self, **options: Unpack[CallOptions]) -> bool:
        """Return whether the server accepts requests: it serves a model, and is not shutting down."""
        try:
            return await self._send(calls.probe("/readyz"), options)
        except NotReady:
            return False

    # How calls are sent

    def _model(self, options: Options) -> str | None:
        model: str | None = options.get("model", self._settings.model)
        return model

    async def _reference(self, options: Options) -> str:
        """Return the model of a call as name or name@version. Raises NotReady if the server has no default model."""
        reference = self._model(options) or (await self._send(calls.models(), options)).default
        if reference is None:
            raise NotReady(503, "not_ready", "the server has no default model: pass model=...")
        return reference

    async def _send(self, call: Call[T], options: Options) -> T:
        """Send `call`, again after failures that may pass, and return its result."""
        attempts = self._settings.attempts(call, options)
        while True:
            try:
                response = await self._exchange(call, attempts.seconds_for_request())
            except httpx.TransportError as error:
                wait = attempts.wait_after_failure(error)
            else:
                if response.status == 200:
                    return result(call, response)
                wait = attempts.wait_after_refusal(refusal(response))
            await asyncio.sleep(wait)

    async def _exchange(self, call: Call[Any], seconds: float | None) -> Received:
        """Send `call` once, and return the response. Without httpx's objects, the client's own transport is faster."""
        if isinstance(self._transport, AsyncSocketTransport):
            head = self._settings.head(call, seconds)
            reader = await self._transport.exchange(self._settings.origin, head, call.body or b"", seconds)
            return reader.received()
        response = await self._transport.handle_async_request(self._settings.request(call, seconds))
        await response.aread()
        return received(response)

    async def _by_row(self, make: Callable[[Array, str | None, Options], Call[R]], rows: Rows, options: Options) -> R:
        """Return the result for `rows`, which the server computes independently of each other."""
        options = self._settings.with_deadline(options)
        return await self._named(
            rows, options, lambda array, pinned: self._in_parts(make, array, {**options, "model": pinned})
        )

    async def _named(self, rows: Rows, options: Options, send: Callable[[Array, str | None], Awaitable[R]]) -> R:
        """Return what `send` returns for the array [N, D] of `rows` and the model to ask.

        The columns of frames and records are put into the order of the features of one version. `send` gets this
        version as name@version, because another version may have another order.
        """
        reference = self._model(options)
        if not (is_frame(rows) or is_records(rows)):
            return await send(to_array(rows), reference)
        known = await self._described(reference, options)
        array = to_ordered_array(rows, known)
        try:
            return await send(array, f"{known.name}@{known.version}")
        except NotFound:
            if not self._settings.forget(reference):
                raise
        known = await self._described(reference, options)  # the version that was remembered is no longer served
        return await send(to_ordered_array(rows, known), f"{known.name}@{known.version}")

    async def _described(self, reference: str | None, options: Options) -> results.Model:
        known = self._settings.remembered(reference)
        if known is None:
            known = await self._send(calls.model(await self._reference(options)), options)
            self._settings.remember(reference, known)
        return known

    async def _in_parts(
        self, make: Callable[[Array, str | None, Options], Call[R]], array: Array, options: Options
    ) -> R:
        """Return the result for `array`, from one request for each part of its rows. One version computes all parts.

        The response to the first request names the version. The other requests then run at the same time, at most
        `concurrency` of them. If one fails, the rest are cancelled.
        """
        options = self._settings.with_deadline(options)
        parts = list(self._settings.parts(array, options))
        first = await self._send(make(parts[0][0], self._model(options), parts[0][1]), options)
        if len(parts) == 1:
            return first
        pinned, slots = f"{first.model}@{first.version}", asyncio.Semaphore(self._concurrency)

        async def send(part: Array, part_options: Options) -> R:
            async with slots:
                return await self._send(make(part, pinned, part_options), options)

        tasks = [asyncio.create_task(send(*part)) for part in parts[1:]]
        try:
            return calls.joined([first, *await asyncio.gather(*tasks)])
        finally:
            for task in tasks:
                task.cancel()
