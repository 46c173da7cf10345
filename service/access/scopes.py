"""The table of all routes and of the scope that each route needs. It applies if the server has API keys."""

from enum import StrEnum

from starlette.routing import compile_path


class Scope(StrEnum):
    """What a key may do. A key with the scope `admin` may do everything."""

    INFER = "infer"  # run models, and read what is known about them
    WRITE = "write"  # change what the server remembers: send feedback, and rows that can raise alerts and drift alarms
    METRICS = "metrics"  # read the metrics, and how groups differ from their peers
    ADMIN = "admin"  # everything, and also rows of the training data


Required = Scope | frozenset[Scope] | None  # what a path needs
OPEN = None  # needs no key
ANY_KEY = frozenset(Scope)  # a path without a route: only a client with a key learns that it does not exist

# The rows that /anomaly scores are live traffic only if the key has the scope `write`, see `endpoints/scoring.py`.
ROUTES: dict[str, Scope | None] = {
    "/anomaly": Scope.INFER,
    "/reconstruct": Scope.INFER,
    "/encode": Scope.INFER,
    "/decode": Scope.INFER,
    "/sample": Scope.INFER,
    "/interpolate": Scope.INFER,
    "/edit": Scope.INFER,
    "/neighbours": Scope.INFER,  # and ADMIN for the values of the neighbours, which are rows of the training data
    "/impute": Scope.INFER,
    "/backtest": Scope.INFER,
    "/api/v1/write": Scope.WRITE,
    "/feedback": Scope.WRITE,
    "/models": Scope.INFER,
    "/models/{reference}": Scope.INFER,
    "/models/{reference}/calibration": Scope.INFER,
    "/models/{reference}/card": Scope.INFER,
    "/models/{reference}/peers": Scope.METRICS,  # names of groups, and values of their newest rows
    "/models/{reference}/held-out": Scope.ADMIN,  # rows of the training data
    "/metrics": Scope.METRICS,
    # The Open Inference Protocol. As for /anomaly, the rows of a request for scores may be live traffic.
    "/v2/models/{name}/infer": Scope.INFER,
    "/v2/models/{name}/versions/{version}/infer": Scope.INFER,
    "/v2/models/{name}": Scope.INFER,
    "/v2/models/{name}/versions/{version}": Scope.INFER,
    "/v2/models/{name}/ready": Scope.INFER,
    "/v2/models/{name}/versions/{version}/ready": Scope.INFER,
    # Orchestrators probe without a key.
    "/livez": OPEN,
    "/readyz": OPEN,
    "/v2": OPEN,
    "/v2/health/live": OPEN,
    "/v2/health/ready": OPEN,
    # The page, its files and the reference are the same on every server. The page asks for a key.
    "/": OPEN,
    "/static/{path:path}": OPEN,
    "/docs": OPEN,
    "/openapi.json": OPEN,
}

# The router's own patterns. They also match `/metrics` followed by a newline, for example: with other patterns, such a
# path would lead to a route whose scope was not checked.
_PATTERNS = [(compile_path(route)[0], scope) for route, scope in ROUTES.items()]


def scope_of(path: str) -> Required:
    """Return the scope that `path` needs: OPEN for no key, and ANY_KEY for a path without a route."""
    try:
        return ROUTES[path]
    except KeyError:
        return next((scope for pattern, scope in _PATTERNS if pattern.match(path)), ANY_KEY)
