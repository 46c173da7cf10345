"""`python -m service`: serve with the settings of the environment."""

import sys

from pydantic import ValidationError

from models.errors import ElboError
from service.settings import Settings


def main() -> None:
    """Serve; what keeps the server from starting is told in one line."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        sys.exit(f"elbo: ELBO_{name}={first['input']}: {first['msg']}")
    from service.server.run import serve  # imports torch, for which a wrong setting need not wait

    try:
        serve(settings)
    except ElboError as error:
        sys.exit(f"elbo: {error}")


if __name__ == "__main__":
    main()
