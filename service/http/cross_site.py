"""Refuse requests that a page of another site could make a browser send to the server.

- A page can let its own host name resolve to the address of the server (DNS rebinding). The browser then lets the page
  read the responses. The Host header of its requests contains the page's own name, so `AllowedHosts` can refuse them.
- A page can send a body without a Content-Type, or of type text/plain: the browser does not first ask the server
  whether it may. `read_fields` refuses a body without a Content-Type. `check_origin` refuses text/plain from pages of
  other sites only, because Telegraf sends this type, too. For the same reason, requests for inference of the Open
  Inference Protocol may lack a Content-Type only if they have no Origin: Triton's client sends none.
"""

import re
from collections.abc import Collection, Mapping

from service.codec.request_body import JSON, media_type_of
from service.errors import BadRequest, UnsupportedMediaType

# Probes send the address of the container as Host.
OPEN_PATHS = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
_PORT = re.compile(r":\d*$")


class AllowedHosts:
    """The host names that requests may be for.

    Args:
        names: host names or IP addresses, in lower case. `*.example.com` stands for every name below example.com.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(name for name in names if not name.startswith("*."))
        self._domains = tuple(name[1:] for name in names if name.startswith("*."))  # each begins with a dot

    def check(self, path: str, host: str) -> None:
        """Raise BadRequest if a request for `path` with this Host header is for another server."""
        name = _PORT.sub("", host.strip().lower()).rstrip(".")
        if name in self._names or (self._domains and name.endswith(self._domains)) or path in OPEN_PATHS:
            return
        raise BadRequest(
            f"the server does not serve the host {host[:100]}",
            expected="a Host header with a name in ELBO_ALLOWED_HOSTS",
            got=host[:100],
            hint="use another name of the server in the URL, or add this name to ELBO_ALLOWED_HOSTS",
        )


def check_origin(headers: Mapping[bytes, bytes]) -> None:
    """Raise UnsupportedMediaType if a browser sends text for a page of another site. Programs send no Origin.

    Args:
        headers: the request headers, with an Origin.
    """
    media_type = media_type_of(headers.get(b"content-type", b"").decode("latin-1"))
    if media_type != "text/plain" or headers[b"origin"].rpartition(b"//")[2] == headers.get(b"host"):
        return
    raise UnsupportedMediaType(
        "a page of another site may not send text/plain", expected=JSON, got=media_type, hint=f"send it as {JSON}"
    )
