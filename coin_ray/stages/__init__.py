"""The stages: one module each with ``run(context) -> metrics``. Only here (and in
serving) is Ray imported.
"""

import os

# read when Ray is imported: without it, a run that waits for its turn on a busy cluster
# prints "No available node types can fulfill ..." where all is well
os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
