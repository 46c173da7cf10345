"""A local cluster of Ray, for the programs of the tests and of the benchmark."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

START_SECONDS = 120  # how long a node may take to start on a busy machine; Ray's own limit is 30 s


@contextmanager
def two_nodes() -> Iterator[tuple[Any, list[Any]]]:
    """Yield a cluster and its two nodes with one core each. The head has no cores, so tasks run only on these nodes.

    In the block, this process is connected to the cluster. Ray sends no usage statistics.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_server_port_wait_time_s": str(START_SECONDS)}
    import ray
    from ray.cluster_utils import Cluster

    store = 100 << 20  # bytes
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(wait=False, num_cpus=1, object_store_memory=store) for _ in range(2)]
        cluster.wait_for_nodes(timeout=START_SECONDS)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster, workers
    finally:
        ray.shutdown()
        cluster.shutdown()
