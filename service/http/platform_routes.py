"""The paths that a cloud platform chooses for its probes and its requests for inference."""

from typing import NamedTuple

READINESS = "/readyz"
INFERENCE = "/anomaly"  # a request for inference needs an API key with the scope of this path


class PlatformRoutes(NamedTuple):
    """The paths of a platform.

    Args:
        health: the path of its probes; empty for none.
        predict: the path of its requests for inference; empty for none.
        has_text_errors: whether the body of an error on `predict` is an object with the text `error`. Otherwise it is
            a problem (RFC 9457), as on the other endpoints.
    """

    health: str = ""
    predict: str = ""
    has_text_errors: bool = False

    def known_path(self, path: str) -> str:
        """Return READINESS for the path of probes, INFERENCE for that of inference, and any other path unchanged."""
        if path and path == self.health:
            return READINESS
        return INFERENCE if path and path == self.predict else path

    def has_text_error(self, path: str) -> bool:
        """Return whether the body of an error on `path` is an object with the text `error`."""
        return self.has_text_errors and path == self.predict


NO_PLATFORM = PlatformRoutes()
