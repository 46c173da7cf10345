"""`python -m service`: run the server with the settings in the ELBO_* environment variables."""

import sys

from pydantic import ValidationError

from models.errors import ElboError, first_fault, printable
from service.settings import Settings


def main() -> None:
    """Run the server; an invalid setting or a failed start ends the process with one line on standard error."""
    try:
        settings = Settings()
    except ValidationError as error:
        fault = first_fault(error)
        sys.exit(f"elbo: ELBO_{'_'.join(fault.path).upper()}: {fault.message}, got {fault.value!r}")
    from service.server.run import serve  # slow, because it imports torch; an invalid setting is reported earlier

    try:
        serve(settings)
    except ElboError as error:
        sys.exit(f"elbo: {printable(str(error))}")


if __name__ == "__main__":
    main()
