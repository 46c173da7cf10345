"""Keep the numbers of the standard streams occupied if the server was started without them."""

import os
import sys


def reserve() -> None:
    """Open /dev/null as standard input, output or error where one of them is closed, as after `elbo serve >&-`.

    Otherwise, the next socket or file that the server opens would get the number of the closed stream, and log lines
    would be written into it. Standard output is opened for reading, so that the log notices that its lines are lost.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets `number`, the lowest number that is free
    if sys.stderr is None:  # Python has found it closed
        sys.stderr = os.fdopen(2, "w", closefd=False)
