"""Build requests and parse responses, without input and output.

Each public function that is named after a method of the clients returns the `Call` that the method sends.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import numpy as np

from elbo.client import results
from elbo.client.errors import InvalidReply
from elbo.client.formats import (
    JSON,
    NPY,
    SAFETENSORS,
    dump_json,
    dump_npy,
    load_json,
    load_npy,
    load_safetensors,
    to_float32,
)
from elbo.client.http1 import Received
from elbo.client.results import Array
from elbo.client.rows import Frame, Record, Rows, is_frame, is_records, to_array, to_records

T = TypeVar("T")
R = TypeVar("R", bound=results.Reply)
Options = Mapping[str, Any]
_CLIENT_OPTIONS = ("model", "timeout", "deadline")


class Call(NamedTuple, Generic[T]):
    """One request, and the function that reads its response.

    Args:
        parse: returns the result of a successful response. Raises InvalidReply.
        path: the path, with its query.
        body: the body; None for GET.
        content_type: media type of the body.
        accept: media type of the response.
        is_safe: whether the request may be sent again although the server may have received it: see `retries`.
    """

    parse: Callable[[Received], T]
    path: str
    body: bytes | None = None
    content_type: str = JSON
    accept: str = JSON
    is_safe: bool = True


# Requests


def _path(path: str, model: str | None, options: Options | None = None) -> str:
    """Return `path` with the model and the options as its query."""
    pairs = [(name, _option(value)) for name, value in (options or {}).items() if name not in _CLIENT_OPTIONS]
    start = _path_of_model(path, model)
    if not pairs:
        return start
    return f"{start}{'&' if model else '?'}{urlencode(pairs, quote_via=quote)}"


@lru_cache(maxsize=256)
def _path_of_model(path: str, model: str | None) -> str:
    return f"{path}?{urlencode({'model': model}, quote_via=quote)}" if model else path


def _option(value: Any) -> str:
    """Return an option as the server reads it in a query: text unquoted, any other value as JSON."""
    is_plain = isinstance(value, str) and not value.startswith('"')
    return value if is_plain else json.dumps(value, ensure_ascii=False, default=float)


def _sent(options: Options) -> dict[str, Any]:
    """Return the options that go to the server."""
    return {name: value for name, value in options.items() if name not in _CLIENT_OPTIONS}


def _array_call(
    parse: Callable[[Received], T],
    path: str,
    array: Array,
    options: Options,
    model: str | None,
    accept: str = SAFETENSORS,
    is_safe: bool = True,
) -> Call[T]:
    return Call(parse, _path(path, model, options), dump_npy(array), NPY, accept, is_safe)


def _json_call(
    parse: Callable[[Received], T],
    path: str,
    content: Mapping[str, Any],
    model: str | None,
    accept: str = SAFETENSORS,
    is_safe: bool = True,
) -> Call[T]:
    return Call(parse, _path(path, model), dump_json(content), JSON, accept, is_safe)


def encode(rows: Array, model: str | None, options: Options) -> Call[results.Encoded]:
    """Return the request for the latents of rows [N, D]."""
    return _array_call(_parse_encoded, "/encode", rows, options, model)


def decode(latents: Array, model: str | None, options: Options) -> Call[results.Decoded]:
    """Return the request for the rows of latents [N, K]."""
    return _array_call(_parse_decoded, "/decode", latents, options, model, NPY)


def reconstruct(rows: Array, model: str | None, options: Options) -> Call[results.Reconstructed]:
    """Return the request for the reconstructions of rows [N, D]."""
    return _array_call(_parse_reconstructed, "/reconstruct", rows, options, model)


def score(rows: Array, model: str | None, options: Options) -> Call[results.Scores]:
    """Return the request for the scores of rows [N, D]."""
    is_safe = options.get("observe") is False
    return _array_call(_parse_scores, "/anomaly", rows, options, model, is_safe=is_safe)


def sample(n: int, model: str | None, options: Options) -> Call[results.Sampled]:
    """Return the request for `n` new rows. The levels of conditions are only in a JSON response."""
    accept = JSON if "condition" in options else SAFETENSORS
    return _json_call(_parse_sampled, "/sample", {"n": n, **_sent(options)}, model, accept)


def interpolate(start: Any, end: Any, model: str | None, options: Options) -> Call[results.LatentPath]:
    """Return the request for the rows between two ends."""
    content = {"start": _end(start), "end": _end(end), **_sent(options)}
    return _json_call(_parse_path, "/interpolate", content, model)


def edit(point: Any, direction: str, model: str | None, options: Options) -> Call[results.LatentPath]:
    """Return the request for a row that moves towards the label `direction`."""
    content = {**_end(point), "direction": direction, **_sent(options)}
    return _json_call(_parse_path, "/edit", content, model)


def _end(point: Any) -> dict[str, Any]:
    """Return the JSON of a point of the latent space. A point that is no mapping is a row: {"input": row}."""
    if isinstance(point, Mapping):
        return {name: _values(value) for name, value in point.items()}
    return {"input": _values(point)}


def _values(values: Any) -> Any:
    return to_array(values) if hasattr(values, "__array__") or hasattr(values, "detach") else values


def impute(rows: Rows, model: str | None, options: Options) -> Call[results.Imputed]:
    """Return the request for the missing values of rows."""
    if is_frame(rows) or is_records(rows):
        return _json_call(_parse_imputed, "/impute", {"records": to_records(rows), **_sent(options)}, model)
    return _array_call(_parse_imputed, "/impute", to_array(rows), options, model)


def neighbours(
    rows: Array | None, latents: Array | None, model: str | None, options: Options
) -> Call[results.Neighbours]:
    """Return the request for the held-out rows that are nearest to rows [N, D] or to latents [N, K]."""
    named = {"inputs": rows, "latents": latents}
    content = {name: value for name, value in named.items() if value is not None}
    return _json_call(_parse_neighbours, "/neighbours", {**content, **_sent(options)}, model, JSON)


def anomaly(rows: Rows, model: str | None, options: Options) -> Call[results.Verdicts]:
    """Return the request for the verdicts on rows."""
    is_safe = options.get("observe") is False
    if is_frame(rows) or is_records(rows):
        content = {"records": to_records(rows), **_sent(options)}
        return _json_call(_parse_verdicts, "/anomaly", content, model, JSON, is_safe)
    return _array_call(_parse_verdicts, "/anomaly", to_array(rows), options, model, JSON, is_safe)


def stream_path(model: str | None, options: Options) -> str:
    """Return the path of a stream of rows to /anomaly."""
    return _path("/anomaly", model, options)


def feedback(
    verdict: str, rows: Frame | Sequence[Record] | None, model: str | None, options: Options
) -> Call[results.FeedbackReply]:
    """Return the request that says whether rows were normal or an incident."""
    records = {} if rows is None else {"records": to_records(rows)}
    content = {"verdict": verdict, **records, **_sent(options)}
    return _json_call(_parse_feedback, "/feedback", content, model, JSON, is_safe=False)


def backtest(rows: Frame | Sequence[Record], model: str | None, options: Options) -> Call[results.BacktestReply]:
    """Return the request that judges a history."""
    content = {"records": to_records(rows), **_sent(options)}
    return _json_call(_parse_backtest, "/backtest", content, model, JSON)


def models() -> Call[results.Models]:
    """Return the request for the list of models."""
    return Call(_parse_models, "/models")


def model(reference: str) -> Call[results.Model]:
    """Return the request for one model version."""
    return Call(lambda response: _model(load_json(response.content)), _of(reference))


def peers(reference: str, options: Options) -> Call[results.Peers]:
    """Return the request for the comparison of groups."""
    return Call(_parse_peers, _path(_of(reference, "/peers"), None, options))


def held_out(reference: str) -> Call[results.HeldOut]:
    """Return the request for the held-out rows."""
    return Call(_parse_held_out, _of(reference, "/held-out"))


def calibration(reference: str) -> Call[results.CalibrationScores]:
    """Return the request for the scores of the calibration set."""
    return Call(_parse_calibration, _of(reference, "/calibration"))


def card(reference: str) -> Call[str]:
    """Return the request for the model card."""
    return Call(lambda response: response.content.decode(), _of(reference, "/card"), accept="*/*")


def probe(path: str) -> Call[bool]:
    """Return the request to a health probe. It is not safe, because a caller wants the state now, not after retries."""
    return Call(lambda response: "status" in load_json(response.content), path, is_safe=False)


def _of(reference: str, part: str = "") -> str:
    return f"/models/{quote(reference, safe='@')}{part}"


# Responses


def _reply(response: Received, content: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return the fields of a `Reply`, and `values`. `content` has the JSON fields or the safetensors metadata.

    Raises:
        InvalidReply: the response names no model.
    """
    try:
        name, version = str(content["model"]), int(content["version"])
    except (KeyError, ValueError) as error:
        raise InvalidReply(f"the response names no model and version: {error}") from error
    warning = content.get("warning") or response.header(b"elbo-warning") or None
    identifier = response.header(b"x-request-id")
    return {"model": name, "version": version, "request_id": identifier, "warning": warning, **values}


def _arrays(response: Received) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and the other fields of a safetensors or JSON response."""
    if response.header(b"content-type").startswith(SAFETENSORS):
        tensors, metadata = load_safetensors(response.content)
        return tensors, dict(metadata)
    content = load_json(response.content)
    names = ("latents", "outputs", "std", "errors", "low", "high", "score", "p_value", "severity")
    return {name: to_float32(content.pop(name)) for name in names if name in content}, content


def _made(
    kind: type[R], response: Received, tensors: Mapping[str, Array], metadata: Mapping[str, Any], **values: Any
) -> R:
    """Return a result of the class `kind`. Raises InvalidReply if the response lacks one of its arrays."""
    given = {**tensors, **_reply(response, metadata, **values)}
    names: tuple[str, ...] = kind.__match_args__  # names of the fields of the dataclass
    if missing := [name for name in names if name not in given]:
        raise InvalidReply(f"the response has no {', '.join(missing)}")
    return kind(**{name: given[name] for name in names})


def _optional(content: Mapping[str, Any], name: str) -> int | None:
    return int(content[name]) if content.get(name) is not None else None


def _parse_encoded(response: Received) -> results.Encoded:
    tensors, metadata = _arrays(response)
    seed, imputed = _optional(metadata, "seed"), _optional(metadata, "imputed") or 0
    return _made(results.Encoded, response, tensors, metadata, seed=seed, imputed=imputed)


def _parse_decoded(response: Received) -> results.Decoded:
    name, _, version = response.header(b"elbo-model").rpartition("@")
    metadata = {"model": name, "version": version}
    return _made(results.Decoded, response, {"outputs": load_npy(response.content)}, metadata)


def _parse_reconstructed(response: Received) -> results.Reconstructed:
    tensors, metadata = _arrays(response)
    return _made(results.Reconstructed, response, tensors, metadata, imputed=_optional(metadata, "imputed") or 0)


def _parse_sampled(response: Received) -> results.Sampled:
    tensors, metadata = _arrays(response)
    seed, conditions = _optional(metadata, "seed"), metadata.get("conditions")
    return _made(results.Sampled, response, tensors, metadata, seed=seed, conditions=conditions)


def _parse_path(response: Received) -> results.LatentPath:
    return _made(results.LatentPath, response, *_arrays(response))


def _parse_imputed(response: Received) -> results.Imputed:
    tensors, metadata = _arrays(response)
    return _made(results.Imputed, response, tensors, metadata, imputed=_optional(metadata, "imputed") or 0)


def _parse_scores(response: Received) -> results.Scores:
    return _made(results.Scores, response, *_arrays(response))


def _parse_neighbours(response: Received) -> results.Neighbours:
    content = load_json(response.content)
    numbers = {
        "indices": np.array(content.get("indices", []), np.int64),
        "distances": to_float32(content.get("distances", [])),
    }
    others = {name: content.get(name) for name in ("usual_distance", "labels", "values")}
    return results.Neighbours(**_reply(response, content, **numbers, **others))


def verdict(content: Mapping[str, Any]) -> results.Verdict:
    """Return the verdict in one object of `results`. Raises KeyError."""
    features = tuple(
        results.Contribution(each["name"], each["value"], each["expected"], each["contribution"])
        for each in content["features"]
    )
    return results.Verdict(
        content["row"],
        content["score"],
        content["p_value"],
        content["severity"],
        content["is_anomaly"],
        features,
        content.get("time"),
        content.get("group"),
        dict(content),
    )


def row_error(content: Mapping[str, Any]) -> results.RowError:
    """Return the error in one object of `errors`. Raises KeyError."""
    return results.RowError(content["row"], content["detail"], content.get("pointer"))


def _parse_verdicts(response: Received) -> results.Verdicts:
    content = load_json(response.content)
    names = ("rows", "anomalies", "failed", "unknown_fields", "alpha", "threshold")
    values: dict[str, Any] = {name: content.get(name) for name in names}
    values["results"] = tuple(map(verdict, content.get("results") or ()))
    values["errors"] = tuple(map(row_error, content.get("errors") or ()))
    return results.Verdicts(**_reply(response, content, **values))


def _parse_feedback(response: Received) -> results.FeedbackReply:
    content = load_json(response.content)
    errors = tuple(map(row_error, content["errors"]))
    return results.FeedbackReply(
        **_reply(response, content),
        verdict=content["verdict"],
        groups=tuple(content["groups"]),
        unused=content["unused"],
        errors=errors,
    )


def _parse_backtest(response: Received) -> results.BacktestReply:
    content = load_json(response.content)
    return results.BacktestReply(**_reply(response, content), report=content)


def _parse_peers(response: Received) -> results.Peers:
    content = load_json(response.content)
    values = {name: content[name] for name in ("time", "compared", "others", "limit")}
    return results.Peers(**_reply(response, content, **values), groups=tuple(content["groups"]))


def _parse_held_out(response: Received) -> results.HeldOut:
    content = load_json(response.content)
    labels, names = content.get("labels"), content.get("label_names")
    return results.HeldOut(
        **_reply(response, content),
        latents=to_float32(content["latents"]),
        inputs=to_float32(content["inputs"]),
        labels=None if labels is None else tuple(labels),
        label_names=None if names is None else tuple(names),
    )


def _parse_calibration(response: Received) -> results.CalibrationScores:
    content = load_json(response.content)
    scores = to_float32(content["scores"])
    return results.CalibrationScores(**_reply(response, content), rows=content["rows"], scores=scores)


def _parse_models(response: Received) -> results.Models:
    content = load_json(response.content)
    return results.Models(
        content.get("default"), tuple(map(_model, content.get("models", ()))), tuple(content.get("failures", ()))
    )


def _model(content: dict[str, Any]) -> results.Model:
    features = tuple(feature["name"] for feature in content.get("features", ()))
    shape = tuple(content["shape"])
    numbers = (content["width"], content["latents"])
    return results.Model(content["name"], content["version"], content["kind"], shape, *numbers, features, content)


def joined(parts: Sequence[R]) -> R:
    """Join the results of requests for parts of the rows into the result of one request for all rows.

    Raises:
        InvalidReply: the parts are of different versions.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    versions = {(part.model, part.version) for part in parts}
    if len(versions) > 1:
        raise InvalidReply(
            f"a new version was published during the call, and computed a part of the rows: {sorted(versions)}; "
            "repeat the call"
        )
    values: dict[str, Any] = {}
    for each in fields(first):
        found = [getattr(part, each.name) for part in parts]
        if isinstance(found[0], np.ndarray):
            values[each.name] = np.concatenate(found)
        elif each.name == "imputed":
            values[each.name] = sum(found)
        else:
            values[each.name] = found[0]
    return type(first)(**values)
