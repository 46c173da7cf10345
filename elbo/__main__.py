"""`python -m elbo` is the command `elbo`."""

from elbo.cli import main

if __name__ == "__main__":
    main()
