"""Metrics as Prometheus scrapes them."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(client: httpx.Client) -> Samples:
    """Return every sample of GET /metrics by its name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def increase(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """Return by how much a sample grew between two scrapes; a missing sample counts as 0."""
    key = (name, frozenset(labels.items()))
    return float(after.get(key, 0) - before.get(key, 0))


def total(samples: Samples, name: str) -> float:
    """Return the sum of a metric over all its label sets."""
    return sum(value for (sample, _), value in samples.items() if sample == name)
