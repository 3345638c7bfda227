"""A member of a population: the pipeline's own distillation, looked at after each
ninth, that may go on from another member's state.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from coin_ray import storage
from coin_ray.errors import CoinError
from coin_ray.runs.steps import Context, context_of, execute
from coin_ray.search.lineage import (
    Look,
    by_place,
    line_of,
    place,
    read_look,
    read_looks,
)
from coin_ray.search.plan import FULL, Search
from coin_ray.search.space import Settings
from coin_ray.search.trial import FAILED, final_figures, looked
from coin_ray.stages import distill
from coin_ray.stages.common.training_job import STATE, Fit, save_weights, train
from coin_ray.training.loop import Curve

Report = Callable[[Look], None]
"""Told of a member after each ninth; under Tune it may end the process."""


def run_member(
    search: Search, number: int, settings: Settings, begun: Look | None, report: Report
) -> None:
    """Train to the end under ``settings``, from the state that ``begun`` names (its own
    or another member's), or from the start.

    What is there already from before a kill is told, not done again. A training that
    diverges counts as failed in all that follows.
    """
    member = Member(search, number, dict(settings), begun, report)
    while (known := member.known()) is not None:
        member.last = known
        report(known)
    if member.ninths == FULL:
        return
    failure = member.last.failure if member.last else ""
    try:
        if not failure:
            member.train()
    except CoinError as error:
        failure = f"{type(error).__name__}: {error}"
    while member.ninths < FULL:
        member.tell({"score": FAILED}, failure)


class Member:
    def __init__(
        self,
        search: Search,
        number: int,
        settings: dict[str, Any],
        begun: Look | None,
        report: Report,
    ) -> None:
        self.search, self.number, self.settings, self.report = (
            search,
            number,
            settings,
            report,
        )
        self.last, self.started = begun, time.monotonic()
        self.folder = storage.join(search.folder, "population", str(number), "training")

    @property
    def ninths(self) -> int:
        return self.last.ninths if self.last else 0

    @property
    def source(self) -> int:
        return self.last.member if self.last else self.number

    def known(self) -> Look | None:
        """The next look, if it was made before a kill, of the same state under the same
        settings.
        """
        look = read_look(self.search.folder, self.number, self.ninths + 1)
        return (
            look
            if look and look.copied == self.source and look.settings == self.settings
            else None
        )

    def train(self) -> None:
        search, config = self.search, self.search.trial_config(self.settings)
        state = storage.join(self.folder, STATE)
        storage.remove(state)
        if self.last:
            storage.write_bytes(
                state,
                storage.read_bytes(
                    place(search.folder, self.last.member, self.last.ninths, ".pt")
                ),
            )
        step = search.steps(self.settings)["distill"]
        made = distill.run(
            replace(context_of(step, config, search.root), folder=self.folder),
            self._fit,
        )
        folder = self._handed_over(made)
        self.tell(final_figures(search, folder))

    def tell(self, figures: Mapping[str, float | None], failure: str = "") -> None:
        """Keep a look, then report it."""
        now = time.monotonic()
        seconds, self.started = round(now - self.started, 1), now
        known = {
            name: float(value) for name, value in figures.items() if value is not None
        }
        look = Look(
            self.number,
            self.ninths + 1,
            self.source,
            self.settings,
            known,
            seconds,
            failure,
        )
        storage.write_json(
            place(self.search.folder, look.member, look.ninths, ".json"),
            dataclasses.asdict(look),
        )
        self.last = look
        self.report(look)

    def _fit(self, work: Fit) -> Curve:
        every = max(1, work.optimize.steps // FULL)
        saving = replace(work, optimize=replace(work.optimize, checkpoint_every=every))
        return train(saving, lambda step, _, state: self._look(every, step, state))

    def _look(self, every: int, step: int, state: Mapping[str, Any] | None) -> None:
        ninths, rest = divmod(step + 1, every)
        if state is None or rest or ninths >= FULL:
            return
        save_weights(place(self.search.folder, self.number, ninths, ".pt"), state)
        # all have been looked at since
        storage.remove(place(self.search.folder, self.number, ninths - 2, ".pt"))
        self.tell(looked(self.search, self.folder, state))

    def _handed_over(self, made: dict[str, Any]) -> str:
        """The folder of the distillation with this line's schedule, finished: what the
        pipeline finds.
        """
        search = self.search
        final = Look(self.number, FULL, self.source, self.settings, {}, 0.0)
        looks = read_looks(search.folder, search.trials, FULL) | by_place([final])
        line = line_of(looks, self.number, FULL)
        step = search.steps(line[0].settings, line)["distill"]

        def moved(context: Context) -> dict[str, Any]:
            for uri in storage.list_files(self.folder):
                storage.write_bytes(
                    storage.join(context.folder, uri.rpartition("/")[2]),
                    storage.read_bytes(uri),
                )
            return made

        if step.manifest(search.root) is None:
            execute(
                step, search.trial_config(line[0].settings, line), search.root, moved
            )
        for uri in storage.list_files(self.folder):
            storage.remove(uri)
        return step.folder(search.root)
