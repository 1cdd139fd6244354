"""What is measured: named, plain functions of a path, one module per family of work."""

from __future__ import annotations

from bench.workloads import changing, crowds, data, layers, looking, projects
from bench.workloads.model import Workload

ALL: list[Workload] = [
    *looking.WORKLOADS,
    *layers.WORKLOADS,
    *data.WORKLOADS,
    *changing.WORKLOADS,
    *crowds.WORKLOADS,
    *projects.WORKLOADS,
]
BY_NAME = {workload.name: workload for workload in ALL}

#: What a change is first asked about.
HEADLINE = ("stat-cold", "read-cold", "untar", "rm-lower", "read-seq", "write-seq")
