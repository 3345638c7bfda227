"""What happens to the cluster during a job, and what must be the same afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from machines import Machine, missing_netem
from real_cluster import IMAGES_ASKED, RUN, SEARCH, Job, RealCluster, wait_until
from servers import missing_database

ASKING = "CloudActor"
TRAINING = "RayTrainWorker"
TRIAL = "ImplicitFunc"
"""Parts of the titles of the processes that ask the cloud, that train, and that run a
trial of a search."""
MAX_ATTEMPTS = 8
FIRST_CALLS = 8
"""Calls after which a collection is disturbed."""
Disturbance = Callable[[RealCluster, Job], None]


@dataclass(frozen=True)
class Scenario:
    """``disturb`` runs once the job has been submitted; ``prepare`` before, ``repair``
    after its end."""

    name: str
    event: str
    """What happens, for the table."""
    disturb: Disturbance
    repair: Callable[[RealCluster], None] = lambda _: None
    prepare: Callable[[RealCluster], None] = lambda _: None
    again: bool = False
    """Whether the same command is given again after the repair."""
    program: str = RUN
    loses_node: bool = False
    """Whether Ray may take a node for lost."""
    missing: Callable[[], str] = str
    """What this machine lacks for it; empty: nothing."""


def do_nothing(cluster: RealCluster, job: Job) -> None:
    """Leave the job alone."""


def _wait_for_calls(job: Job) -> None:
    wait_until(lambda: job.served_calls() >= FIRST_CALLS, "the first calls")


def _wait_for_training(job: Job, step: str) -> None:
    wait_until(lambda: job.has_checkpoint(step), f"a checkpoint of {step}")


class AsksFromHead(Exception):
    """The process that asks the cloud, which needs no CPU, runs on the head."""


def _asking_node(cluster: RealCluster, job: Job) -> Machine:
    _wait_for_calls(job)
    if cluster.head.processes(ASKING):
        raise AsksFromHead
    return cluster.worker_with(ASKING)


def _training_node(cluster: RealCluster, job: Job) -> Machine:
    _wait_for_training(job, "propagate")
    machine = cluster.worker_with(TRAINING)
    job.disturbed_at = time.monotonic()
    return machine


def _other_node(cluster: RealCluster, job: Job) -> Machine:
    training = _training_node(cluster, job)
    (other,) = [machine for machine in cluster.workers if machine is not training]
    return other


def _trial_node(cluster: RealCluster, job: Job) -> Machine:
    _wait_for_training(job, "distill")
    machine = cluster.worker_with(TRIAL)
    job.disturbed_at = time.monotonic()
    return machine


def _head_in_training(cluster: RealCluster, job: Job) -> Machine:
    _wait_for_training(job, "propagate")
    job.disturbed_at = time.monotonic()
    return cluster.head


FindMachine = Callable[[RealCluster, Job], Machine]


def unplug_for(seconds: float, find_machine: FindMachine) -> Disturbance:
    """Return a disturbance: a cable is out for so long."""

    def disturb(cluster: RealCluster, job: Job) -> None:
        machine = find_machine(cluster, job)
        machine.unplug()
        time.sleep(seconds)
        machine.plug_in()

    return disturb


def unplug(find_machine: FindMachine) -> Disturbance:
    """Return a disturbance: a cable is out until the job has ended."""
    return lambda cluster, job: find_machine(cluster, job).unplug()


def cut_power(find_machine: FindMachine) -> Disturbance:
    """Return a disturbance: a machine is off until the job has ended."""
    return lambda cluster, job: find_machine(cluster, job).cut_power()


def store_away_for(seconds: float, wait: Callable[[Job], None]) -> Disturbance:
    """Return a disturbance: the object store refuses connections for so long."""

    def disturb(cluster: RealCluster, job: Job) -> None:
        wait(job)
        if job.has_checkpoint("propagate"):
            job.disturbed_at = time.monotonic()
        cluster.store.go_away()
        time.sleep(seconds)
        cluster.store.come_back()

    return disturb


def bring_back_workers(cluster: RealCluster) -> None:
    """Plug in and switch on every worker, and wait until all have joined."""
    for machine in cluster.workers:
        if machine.is_on():
            machine.plug_in()
        else:
            machine.switch_on()
    cluster.join_again()


def switch_on_head(cluster: RealCluster) -> None:
    """Start the head again, and the cluster by the page's command."""
    cluster.head.switch_on()
    cluster.up()


def lose_head(cluster: RealCluster, job: Job) -> None:
    """Cut the head's power while it trains: the cluster and the job are lost."""
    _wait_for_training(job, "propagate")
    job.served_before = job.served_calls()  # the count lies on the head
    job.disturbed_at = time.monotonic()
    cluster.head.cut_power()


def limit_links(cluster: RealCluster) -> None:
    """Give every machine a link of 20 Mbit/s."""
    for machine in cluster.machines:
        machine.limit_link("20mbit")


def degrade_links(cluster: RealCluster) -> None:
    """Give every link a delay of 50 ms and a loss of 1 %."""
    for machine in cluster.machines:
        machine.degrade_link("50ms", "1%")


def free_links(cluster: RealCluster) -> None:
    """Make all links fast and reliable again."""
    for machine in cluster.machines:
        machine.free_link()


def restart_database(cluster: RealCluster, job: Job) -> None:
    """Stop MLflow's PostgreSQL in the middle of a training; start it after 10 s."""
    database = cluster.tracking.database
    assert database is not None
    _wait_for_training(job, "propagate")
    database.stop()
    time.sleep(10)
    database.start()


def refuse_a_tenth(cluster: RealCluster) -> None:
    """Let the object store answer a tenth of the requests with 503 SlowDown."""
    cluster.store.refused_share = 0.1


def refuse_nothing(cluster: RealCluster) -> None:
    """Let the object store answer every request."""
    cluster.store.refused_share = 0.0


def fill_disk(cluster: RealCluster, job: Job) -> None:
    """Fill ``/tmp`` of the node that trains."""
    _training_node(cluster, job).fill_disk()


def empty_disks(cluster: RealCluster) -> None:
    """Make room on every worker."""
    for machine in cluster.workers:
        machine.empty_disk()


def switch_off_second_worker(cluster: RealCluster) -> None:
    """Leave the head with one worker."""
    cluster.workers[1].cut_power()
    wait_until(
        lambda: cluster.count_nodes() == len(cluster.machines) - 1,
        "the head to miss the worker",
    )


def switch_on_second_worker(cluster: RealCluster, job: Job) -> None:
    """Let the second worker join in the middle of a training."""
    _wait_for_training(job, "propagate")
    cluster.workers[1].switch_on()
    cluster.join_again()


SCENARIOS = (
    Scenario("undisturbed", "nothing", do_nothing),
    Scenario(
        "asking-10s",
        "the cable of the node that asks is out for 10 s",
        unplug_for(10, _asking_node),
    ),
    Scenario(
        "asking-cable",
        "the cable of the node that asks is out for good",
        unplug(_asking_node),
        bring_back_workers,
        loses_node=True,
    ),
    Scenario(
        "training-10s",
        "the cable of the node that trains is out for 10 s",
        unplug_for(10, _training_node),
    ),
    Scenario(
        "training-cable",
        "the cable of the node that trains is out for good",
        unplug(_training_node),
        bring_back_workers,
        loses_node=True,
    ),
    Scenario(
        "other-cable",
        "the cable of the node that does not train is out for good",
        unplug(_other_node),
        bring_back_workers,
        loses_node=True,
    ),
    Scenario(
        "asking-power",
        "the node that asks loses its power",
        cut_power(_asking_node),
        bring_back_workers,
        loses_node=True,
    ),
    Scenario(
        "training-power",
        "the node that trains loses its power",
        cut_power(_training_node),
        bring_back_workers,
        loses_node=True,
    ),
    Scenario(
        "head-20s",
        "the cable of the head is out for 20 s of a training",
        unplug_for(20, _head_in_training),
    ),
    Scenario(
        "head-power",
        "the head loses its power; `ray up` and the same command again",
        lose_head,
        switch_on_head,
        again=True,
        loses_node=True,
    ),
    Scenario(
        "store-5s",
        "the object store is away for 5 s of a collection",
        store_away_for(5, _wait_for_calls),
    ),
    Scenario(
        "store-40s",
        "the object store is away for 40 s of a collection",
        store_away_for(40, _wait_for_calls),
    ),
    Scenario(
        "store-300s",
        "the object store is away for 300 s of a collection",
        store_away_for(300, _wait_for_calls),
    ),
    Scenario(
        "store-40s-training",
        "the object store is away for 40 s of a training",
        store_away_for(40, lambda job: _wait_for_training(job, "propagate")),
    ),
    Scenario(
        "store-503",
        "the object store answers a tenth of the requests with 503 SlowDown",
        do_nothing,
        refuse_nothing,
        refuse_a_tenth,
    ),
    Scenario(
        "links-20mbit",
        "every link has 20 Mbit/s",
        do_nothing,
        free_links,
        limit_links,
    ),
    Scenario(
        "links-loss",
        "every link delays by 50 ms and loses 1 %",
        do_nothing,
        free_links,
        degrade_links,
        missing=missing_netem,
    ),
    Scenario(
        "database-restart",
        "MLflow's PostgreSQL is stopped for 10 s of a training",
        restart_database,
        missing=missing_database,
    ),
    Scenario(
        "disk-full",
        "`/tmp` of the node that trains is full; room, and the same command again",
        fill_disk,
        empty_disks,
        again=True,
    ),
    Scenario(
        "node-joins",
        "one worker; the second joins in the middle of a training",
        switch_on_second_worker,
        bring_back_workers,
        switch_off_second_worker,
        loses_node=True,
    ),
    Scenario("search", "nothing, in a search of 3 trials", do_nothing, program=SEARCH),
    Scenario(
        "search-cable",
        "the cable of a node that runs a trial is out for good",
        unplug(_trial_node),
        bring_back_workers,
        loses_node=True,
        program=SEARCH,
    ),
)


def reference(program: str) -> str:
    """Return the name of the first scenario of a program, in which nothing happens."""
    return next(s.name for s in SCENARIOS if s.program == program)


def skipped_row(scenario: Scenario) -> str:
    """Return the row of a scenario that this machine can't run."""
    date = time.strftime("%Y-%m-%d")
    reason = f"not run: needs {scenario.missing()}"
    cells = [scenario.name, scenario.event, date, "", "", "", "", "", reason]
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    scenario: Scenario
    date: str
    seconds: float
    made: int
    maybe_billed: int
    served: int
    differences: tuple[str, ...]
    """Figures that are not those of the undisturbed run."""
    recovery: float | None = None
    """Seconds from the disturbance of a training to its next step."""
    lost_nodes: int = 0
    """Nodes that Ray took for lost."""
    tracebacks: int = 0
    """Tracebacks in the job's log, in which what is handled is one line."""

    def __str__(self) -> str:
        same = "yes" if not self.differences else f"no: {', '.join(self.differences)}"
        cells = [
            self.scenario.name,
            self.scenario.event,
            self.date,
            f"{self.seconds:.0f}",
            "" if self.recovery is None else f"{self.recovery:.0f}",
            str(self.made),
            str(self.maybe_billed),
            str(self.served),
            same,
        ]
        return f"| {' | '.join(cells)} |"

    def problems(self) -> list[str]:
        """Return what must not be: other figures, or calls that no account has."""
        problems = [f"{name} differs" for name in self.differences]
        if not self.made <= self.served <= self.made + self.maybe_billed:
            problems.append(
                f"the server counted {self.served} calls, the summary {self.made} and"
                f" {self.maybe_billed} that may be billed"
            )
        if self.lost_nodes and not self.scenario.loses_node:
            problems.append(f"Ray took {self.lost_nodes} nodes for lost")
        if self.tracebacks:
            problems.append(f"{self.tracebacks} tracebacks in the job's log")
        if self.made < IMAGES_ASKED:
            problems.append(f"{self.made} calls for {IMAGES_ASKED} images")
        return problems


def count_tracebacks(log: str) -> int:
    """Count the tracebacks in a job's log, but for what Python itself ignores: an idle
    worker that Ray ends while it deletes an object.
    """
    ignored = re.findall(r"Exception ignored in: .*\n.*Traceback \(most recent", log)
    return log.count("Traceback (most recent call last)") - len(ignored)


def run_scenario(
    cluster: RealCluster, scenario: Scenario, expected: Job | None
) -> tuple[Job, Row]:
    """Run the small job while the scenario happens, and compare it with the undisturbed
    one; None: this is the undisturbed one.
    """
    scenario.prepare(cluster)
    try:
        job = _submit_and_disturb(cluster, scenario)
        cluster.finish(job)
        if not scenario.again:
            return job, _compare(scenario, job, expected)
    finally:
        scenario.repair(cluster)
    cluster.submit_again(job)
    cluster.finish(job)
    return job, _compare(scenario, job, expected)


def _submit_and_disturb(cluster: RealCluster, scenario: Scenario) -> Job:
    """Submit the job and disturb it. A job whose cloud is asked from the head, where
    no fault is tried in a collection, is replaced by another one.
    """
    for attempt in range(MAX_ATTEMPTS):
        name = f"{scenario.name}-again{attempt}" if attempt else scenario.name
        job = cluster.submit(name, scenario.program)
        try:
            scenario.disturb(cluster, job)
        except AsksFromHead:
            cluster.kill(job)
            continue
        return job
    raise RuntimeError(f"{MAX_ATTEMPTS} times the cloud was asked from the head")


def _compare(scenario: Scenario, job: Job, expected: Job | None) -> Row:
    figures = job.figures()
    reference = figures if expected is None else expected.figures()
    differences = [name for name in reference if figures.get(name) != reference[name]]
    account = job.calls()
    return Row(
        scenario,
        time.strftime("%Y-%m-%d"),
        job.seconds,
        account["made"],
        account["maybe_billed"],
        job.served_calls(),
        tuple(differences),
        job.recovery_seconds(),
        job.log().count("has been marked dead"),
        count_tracebacks(job.log()),
    )
