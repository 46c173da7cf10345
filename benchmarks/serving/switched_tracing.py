"""Run the server like `python -m service`. Each SIGUSR2 switches tracing off, and on again.

`benchmarks/serving/tracing.py` compares the two states of one process. Two processes of the same program differ by more
than tracing costs, because of their addresses in memory.
"""

import signal
from collections.abc import Mapping

from service.__main__ import main
from service.monitoring.metrics import Metrics


class SwitchedMetrics(Metrics):
    """Metrics whose tracer a signal takes away and gives back."""

    def trace_requests(self, environment: Mapping[str, str]) -> None:
        """Trace requests until the first SIGUSR2."""
        super().trace_requests(environment)
        tracer = self.tracer

        def switch(*_: object) -> None:
            self.tracer = None if self.tracer else tracer

        signal.signal(signal.SIGUSR2, switch)


if __name__ == "__main__":
    from service import app

    app.__dict__["Metrics"] = SwitchedMetrics  # the app makes its metrics by this name
    main()
