"""The state of each group's online calibration, on which the alerts of the group depend.

The process that has judged the rows of a group writes the state to shared memory while it still has the group locked,
and the leader process reads it when it decides on the alert.
"""

from time import monotonic

from service.anomaly.online_calibration import State
from service.anomaly.streams import STATES
from service.monitoring.metric_types import Labels
from service.shared_memory import SharedCounters

FAMILY = "alert_states"  # key of the arrays in shared memory; no metric may have this name
_PER_SECOND = 1_000_000


class AlertStates:
    """The latest state of each group, by model, version and group.

    Args:
        counters: the shared memory of all processes.
        max_age: age in seconds above which a state is unknown, because the group has stopped sending rows.
    """

    def __init__(self, counters: SharedCounters, max_age: float) -> None:
        self._counters = counters
        self._max_age = max_age

    def record(self, labels: Labels, state: State) -> None:
        """Keep `state` as the latest state of a group."""
        # Time and state are one number, so that no reader combines the time of one row with the state of another. The
        # clock is the same in all processes.
        moment = int(monotonic() * _PER_SECOND)
        self._counters.local.array((FAMILY, *labels), 1)[0] = float(moment * len(STATES) + STATES.index(state))

    def latest(self, labels: Labels) -> State | None:
        """Return the state that any process has recorded last; None if there is none, or if it is too old."""
        latest = max((array[0] for array in self._counters.arrays_at((FAMILY, *labels))), default=0.0)
        moment, index = divmod(int(latest), len(STATES))
        if not moment or monotonic() - moment / _PER_SECOND > self._max_age:
            return None
        return STATES[index]
