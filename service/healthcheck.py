"""`python -m service.healthcheck`: exit with 0 if the server on this machine is ready, as a container's health check.

It asks /readyz at ELBO_HOST and ELBO_PORT, or at the port of a cloud platform. It uses HTTPS if ELBO_TLS_CERTIFICATE is
set. The certificate is not verified, because it is made for the server's public name, not for this address.
`http.client` ignores proxy variables.
"""

import http.client
import os
import ssl
import sys

from service.platforms import settings_of

EVERY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104 - values of ELBO_HOST that are no address to connect to
SECONDS = 4  # until the check fails without an answer


def main() -> None:
    """Exit with 0 if the server is ready, otherwise with 1."""
    text = settings_of(os.environ).get("port") or os.environ.get("ELBO_PORT", "")
    port = int(text) if text.isdigit() else 8000  # Kubernetes may set ELBO_PORT to tcp://10.0.0.1:80
    host = os.environ.get("ELBO_HOST", "")
    host = "127.0.0.1" if host in EVERY_ADDRESS else host
    connection: http.client.HTTPConnection
    if os.environ.get("ELBO_TLS_CERTIFICATE"):
        context = ssl._create_unverified_context()  # noqa: S323 - see above
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"the server on port {port} does not answer: {error}")
    sys.exit(0 if status == 200 else f"the server on port {port} is not ready: status {status}")


if __name__ == "__main__":
    main()
