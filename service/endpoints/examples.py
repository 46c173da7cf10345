"""Example requests in the OpenAPI document, valid for the demonstration models (8x8 digits, 16 latents)."""

from typing import Any

import orjson

from service.anomaly.inputs import PLAIN_TEXT
from service.codec import csv_rows, ndjson
from service.schemas import (
    AnomalyBody,
    BacktestBody,
    Body,
    DecodeBody,
    EditBody,
    EncodeBody,
    FeedbackBody,
    ImputeBody,
    InterpolateBody,
    NeighboursBody,
    ReconstructBody,
    SampleBody,
)

# Images of two digits. Each string is a line of pixels, and each character is the grey value of a pixel, from 0 to 9.
ZERO = ("00598100", "03920930", "06600650", "08400580", "08400580", "06600740", "02930910", "00598200")
ONE = ("00028400", "00088500", "00498500", "05998500", "00088500", "00088500", "00088500", "00048600")


def _image(lines: tuple[str, ...]) -> list[list[float]]:
    return [[round(int(digit) / 9, 2) for digit in line] for line in lines]


def _flat(lines: tuple[str, ...]) -> list[float]:
    return [value for line in _image(lines) for value in line]


def _record(lines: tuple[str, ...]) -> dict[str, float]:
    return {f"pixel[{i},{j}]": value for i, line in enumerate(_image(lines)) for j, value in enumerate(line)}


def _latent(*leading: float) -> list[float]:
    return [*leading, *[0.0] * (16 - len(leading))]


EXAMPLES: dict[type[Body], dict[str, dict[str, Any]]] = {
    EncodeBody: {
        "nested": {"summary": "two rows, nested 8x8", "value": {"inputs": [_image(ZERO), _image(ONE)]}},
        "flat": {"summary": "one row, flat", "value": {"inputs": [_flat(ZERO)]}},
        "sampled": {
            "summary": "a sample from the posterior instead of its mean",
            "value": {"inputs": [_image(ONE)], "sample": True, "seed": 7},
        },
    },
    DecodeBody: {
        "origin": {"summary": "the origin of the latent space", "value": {"latents": [_latent()]}},
        "one": {"summary": "one latent vector", "value": {"latents": [_latent(0.5, -1.2, 0.8)]}},
        "several": {
            "summary": "three latent vectors that differ in the first latent",
            "value": {"latents": [_latent(-1.5), _latent(0.0), _latent(1.5)]},
        },
    },
    ReconstructBody: {
        "nested": {"summary": "two rows, nested 8x8", "value": {"inputs": [_image(ZERO), _image(ONE)]}},
        "flat": {"summary": "one row, flat", "value": {"inputs": [_flat(ONE)]}},
        "blank": {"summary": "an empty image, which is not a digit", "value": {"inputs": [[[0] * 8] * 8]}},
    },
    SampleBody: {
        "one": {"summary": "one sample", "value": {"n": 1}},
        "seeded": {"summary": "sixteen samples, the same every time", "value": {"n": 16, "seed": 42}},
        "calm": {"summary": "samples near the mean of the prior", "value": {"n": 4, "seed": 42, "temperature": 0.5}},
        "standard": {
            "summary": "samples from the prior N(0, I), which a VAE has",
            "value": {"n": 4, "seed": 42, "prior": "standard"},
        },
        "near": {
            "summary": "four digits like this one",
            "value": {"n": 4, "seed": 42, "near": {"input": _image(ONE)}, "spread": 0.3},
        },
        "given": {
            "summary": "four digits with the same upper half",
            "value": {"n": 4, "seed": 42, "given": _flat(ONE)[:32] + [None] * 32},
        },
    },
    ImputeBody: {
        "image": {
            "summary": "a digit whose lower half is missing",
            "value": {"inputs": [_flat(ZERO)[:32] + [None] * 32]},
        },
        "pixel": {
            "summary": "two digits, each without a pixel",
            "value": {"inputs": [[None, *_flat(ZERO)[1:]], [*_flat(ONE)[:-1], None]]},
        },
        "records": {
            "summary": "objects without some of the features",
            "value": {"records": [dict(list(_record(ONE).items())[:40])]},
        },
    },
    InterpolateBody: {
        "rows": {
            "summary": "from one row to another",
            "value": {"start": {"input": _image(ZERO)}, "end": {"input": _image(ONE)}, "steps": 5},
        },
        "latents": {
            "summary": "from one latent vector to another along a great circle",
            "value": {
                "start": {"latent": _latent(1.5, 0.5)}, "end": {"latent": _latent(-0.5, 1.5)},
                "steps": 8, "method": "slerp",
            },
        },
        "mixed": {
            "summary": "from a row to the origin of the latent space",
            "value": {"start": {"input": _flat(ONE)}, "end": {"latent": _latent()}, "steps": 3},
        },
    },
    EditBody: {
        "towards": {"summary": "a zero, moved towards the nines", "value": {"input": _image(ZERO), "direction": "9"}},
        "walk": {
            "summary": "five steps from a one towards the sevens, away from the ones",
            "value": {"input": _image(ONE), "direction": "7", "away_from": "1", "amount": 1.5, "steps": 5},
        },
    },
    NeighboursBody: {
        "rows": {
            "summary": "the five nearest held-out rows of two rows",
            "value": {"inputs": [_image(ZERO), _image(ONE)]},
        },
        "latents": {
            "summary": "the two nearest held-out rows of the origin, with their values",
            "value": {"latents": [_latent()], "n": 2, "values": True},
        },
    },
    AnomalyBody: {
        "inputs": {
            "summary": "a digit and an empty image",
            "value": {"inputs": [_image(ZERO), [[0] * 8] * 8]},
        },
        "strict": {
            "summary": "false-alarm rate 1 %, five features reported",
            "value": {"inputs": [_flat(ONE)], "alpha": 0.01, "explain": 5},
        },
        "fdr": {
            "summary": "false discovery rate 10 %: the expected share of normal rows among those flagged",
            "value": {"inputs": [_flat(ZERO), _flat(ONE), [1] * 64], "fdr": 0.1, "explain": 0},
        },
        "records": {"summary": "objects by feature name, in any order", "value": {"records": [_record(ONE)]}},
        "telegraf": {
            "summary": "a Telegraf batch: the fields of one host at one time form a row",
            "value": {
                "metrics": [{"name": "scan", "tags": {"host": "a"}, "fields": _record(ZERO), "timestamp": 1.7e9}]
            },
        },
        "smoothed": {
            "summary": "rows of one host over time, decided by their mean severity",
            "value": {
                "records": [_record(ZERO) | {"host": "a", "timestamp": 1.7e9 + 30 * i} for i in range(3)],
                "half_life": 60.0, "detail": "none",
            },
        },
    },
    BacktestBody: {
        "records": {
            "summary": "rows of two hosts over time",
            "value": {
                "records": [
                    _record(digit) | {"host": host, "timestamp": 1.7e9 + 60 * i}
                    for i in range(3) for host, digit in (("a", ZERO), ("b", ONE))
                ],
                "alphas": [0.05, 0.01],
                "incidents": [{"start": 1.7e9 + 60, "end": 1.7e9 + 120, "group": "b"}],
            },
        },
    },
}  # fmt: skip

EXAMPLES[FeedbackBody] = {
    "remembered": {
        "summary": "remembered rows of a host were normal",
        "value": {
            "verdict": "normal", "group_name": "web-4",
            "since": "2025-04-09T08:00:00Z", "until": "2025-04-09T08:30:00Z",
        },
    },
    "state": {
        "summary": "what the host is doing now is an incident, although it has lasted long",
        "value": {"verdict": "incident", "group_name": "web-4"},
    },
    "records": {
        "summary": "rows that are no longer remembered were normal",
        "value": {"verdict": "normal", "records": [_record(ONE) | {"host": "web-4", "timestamp": 1.7e9}]},
    },
}  # fmt: skip

NDJSON_EXAMPLE = "\n".join(orjson.dumps(_record(digit)).decode() for digit in (ZERO, ONE))
CSV_EXAMPLE = "\n".join(
    (",".join(f'"{name}"' for name in _record(ONE)), ",".join(str(value) for value in _record(ONE).values()))
)
TELEGRAF_EXAMPLE = orjson.dumps(EXAMPLES[AnomalyBody]["telegraf"]["value"]).decode()

# The OpenAPI descriptions of request bodies in text formats, by media type.
TEXTS: dict[str, dict[str, Any]] = {
    **{media_type: {"schema": {"type": "string"}, "example": NDJSON_EXAMPLE} for media_type in ndjson.MEDIA_TYPES},
    csv_rows.MEDIA_TYPE: {"schema": {"type": "string"}, "example": CSV_EXAMPLE},
    PLAIN_TEXT: {"schema": {"type": "string"}, "example": TELEGRAF_EXAMPLE},
}
