"""A Ray cluster of several nodes on this machine, and its worker processes."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
MEMORY = {"object_store_memory": 80 * 2**20}  # of each node


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """Ray nodes of one CPU each, behind one without. RAY_ADDRESS names them."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, **MEMORY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        # Nodes that do not answer are given up after seconds.
        patch.setenv("RAY_health_check_period_ms", "500")
        found = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes):
            found.add_node(num_cpus=1, **MEMORY)
        patch.setenv("RAY_ADDRESS", found.address)
        ray.init(address=found.address, log_to_driver=False)
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


def workers() -> list[psutil.Process]:
    """The worker processes of this process's cluster that do a task of a preparation."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.startswith("ray::_do") for word in process.cmdline()):
                found.append(process)
    return found


def remove_a_node(nodes: Any) -> None:
    """Kill a node of the cluster, and wait until Ray knows."""
    import ray

    alive = sum(node["Alive"] for node in ray.nodes())
    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    while sum(node["Alive"] for node in ray.nodes()) >= alive:
        time.sleep(0.05)
