"""The stages: one module each with ``run(context) -> metrics``. Only here (and in
serving) is Ray imported.
"""

import os

# read when Ray is imported: without it, a run that waits for its turn on a busy cluster
# prints "No available node types can fulfill ..." where all is well
os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
# Ray Data repeats its last request for CPUs while less than this share of them is in
# use, which keeps idle nodes: at 0 it computes each request from the measured rates
os.environ.setdefault("RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_CPU_UTIL_THRESHOLD", "0")
