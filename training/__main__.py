"""`python -m training DATA ...` is `elbo train DATA ...`."""

import sys

from elbo.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
