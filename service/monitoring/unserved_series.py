"""Remove the metric series of model versions that no worker serves any more.

Every process renews a lease for each version that it serves (`service.shared_memory.Leases`). The lease tells all
processes the same time at which the version was last served:

- after HIDDEN_SECONDS, no process exports the series of the version;
- after FREED_SECONDS, each process frees its own numbers, so that new versions can use the memory.

A series is hidden in all processes before the first process frees its numbers. Prometheus therefore never sees a
counter fall: the series of the counter ends.
"""

from collections.abc import Iterable

from service.inference.backend_selection import DECISIONS
from service.inference.registry import Catalogue
from service.monitoring.metric_types import Family
from service.shared_memory import LEASE, Key, SharedCounters

RENEWAL_SECONDS = 5.0  # interval between two calls of `UnservedSeries.free`
HIDDEN_SECONDS = 180.0  # longer than usual scrape intervals: Prometheus must get the last numbers
FREED_SECONDS = 240.0
ENDED_SECONDS = 300.0  # after this time, the lease itself is freed


class UnservedSeries:
    """Finds the series of versions that no process serves any more.

    Args:
        counters: the counters of all processes.
        families: the metrics; those without the label `version` are ignored.
        others: for each other family of arrays in shared memory, the part of its keys that holds the model and the
            version.
    """

    def __init__(self, counters: SharedCounters, families: Iterable[Family], others: dict[str, slice]) -> None:
        self._segment = counters.local
        self._leases = counters.leases
        self._families = {family.name: family for family in families if "version" in family.labels}
        self._subject_places = {LEASE: slice(1, None), DECISIONS: slice(0, 2), **others}
        for family in self._families.values():
            place = 1 + family.labels.index("model")
            self._subject_places[family.name] = slice(place, place + 2)
        self._seen = 0  # number of arrays of this process at the last call of `free`

    def renew(self, catalogue: Catalogue) -> None:
        """Renew the leases of the versions that this process serves, and of the selected backends of these versions."""
        served = [one for versions in catalogue.models.values() for one in versions.values()]
        self._leases.renew([one.metric_labels for one in served])
        self._leases.renew([(DECISIONS, one.manifest.weights_sha256) for one in served])

    def hidden(self) -> set[Key]:
        """Return the versions whose series are not exported, each as the labels `model` and `version`."""
        return {subject for subject, age in self._leases.ages().items() if age > HIDDEN_SECONDS}

    def free(self) -> set[Key]:
        """Free the numbers of this process that belong to versions which are no longer served.

        Return these versions, each as the labels `model` and `version`.
        """
        ages = self._leases.ages()
        expired = {subject for subject, age in ages.items() if age > FREED_SECONDS}
        entries = self._segment.entries()
        if not expired and len(entries) == self._seen:
            return set()
        freed, without_lease = [], set()
        for key in list(entries):
            place = self._subject_places.get(key[0])
            if place is None or not all(key[place]):  # a series without a version counts requests without a model
                continue
            subject = key[place]
            if subject not in ages:
                without_lease.add(subject)  # for example, a request has ended long after its version was removed
            elif subject in expired and (key[0] != LEASE or ages[subject] > ENDED_SECONDS):
                freed.append(key)
        self._leases.renew(without_lease)
        for family, *labels in freed:
            if family in self._families:
                self._families[family].forget(tuple(labels))
        if freed:
            self._segment.free(freed)
        self._seen = len(self._segment.entries())
        return expired
