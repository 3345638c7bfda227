"""Several clouds as one: their boxes fused, the first that can be asked, or a second
opinion where CLIP contradicts the first.

Each cloud keeps its own client, with its governor, budget and keys in the journal.
Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import AsyncGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.label_map import ASSUMED_PRECISION, Prior
from coin_ray.cloud.protocol import RawDetections, ScoreKind
from coin_ray.cloud.renderings import image_in_view
from coin_ray.config import PLAIN_RENDERING, Cloud, Ensemble, PipelineConfig
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    QuotaExhausted,
)

WEIGHT_MIN = 1e-9
"""Of a box with score 0, so that a cluster of such boxes has a mean."""
KINDS: tuple[ScoreKind, ...] = ("per_class", "label", "self_reported")
"""Best first; fused boxes are of the worst kind among them."""
SPENT: Mapping[str, type[CloudError]] = {
    "skipped_budget": BudgetExhausted,
    "skipped_quota": QuotaExhausted,
}
"""What ends the run when nobody else can be asked, by the status of the answer."""


def fuse(
    answers: Sequence[RawDetections], reliability: Sequence[float], iou: float
) -> RawDetections:
    """Weighted box fusion of what several clouds said about one image; one answer stays
    as it is.

    From the box with the highest reliability x score down, whatever its class, each
    joins the fused box it overlaps most and at least ``iou``; a cloud has one box in
    each. Boxes are means weighted by reliability x score, class scores means over all
    answers weighted by reliability: a cloud that did not see the box contributes zeros.
    Labels without score must be scored before.
    """
    if len(answers) == 1:
        return answers[0]
    said = [
        answers[i]
        for i in sorted(
            range(len(answers)), key=lambda i: (reliability[i], *_content(answers[i]))
        )
    ]
    trust = np.sort(np.asarray(reliability, np.float64))
    boxes = np.concatenate([a.boxes for a in said]).astype(np.float64)
    class_scores = np.concatenate([a.class_scores for a in said]).astype(np.float64)
    cloud = np.repeat(np.arange(len(said)), [len(a) for a in said])
    weights = np.maximum(trust[cloud] * class_scores.max(1, initial=0), WEIGHT_MIN)
    fused, members = _clusters(boxes, weights, cloud, iou)
    share = trust / trust.sum()
    scores = np.array(
        [share[cloud[m]] @ class_scores[m] for m in members], np.float32
    ).reshape(len(members), class_scores.shape[1])
    best_first = np.argsort(-scores.max(1, initial=0), kind="stable")
    kind = max(
        (KINDS[-1] if a.score_kind == "none" else a.score_kind for a in said),
        key=KINDS.index,
    )
    return RawDetections(
        fused[best_first],
        scores[best_first],
        kind,
        tuple(name for a in said for name in a.unmapped),
    )


def _content(raw: RawDetections) -> tuple[Any, ...]:
    """Orders answers, so that the order in which the clouds are named decides nothing,
    not even a tie.
    """
    return raw.boxes.tobytes(), raw.class_scores.tobytes(), raw.score_kind, raw.unmapped


def _clusters(
    boxes: NDArray[np.float64],
    weights: NDArray[np.float64],
    cloud: NDArray[np.int64],
    iou: float,
) -> tuple[NDArray[np.float32], list[list[int]]]:
    """Fused boxes [M, 4], and the rows of ``boxes`` [N, 4] that each is the mean of."""
    members: list[list[int]] = []
    fused = np.zeros_like(boxes)
    holds = np.zeros((len(boxes), int(cloud.max(initial=0)) + 1), bool)
    for row in np.argsort(-weights, kind="stable").tolist():
        overlaps = (
            _ious(boxes[row], fused[: len(members)])
            * ~holds[: len(members), cloud[row]]
        )
        place = (
            int(overlaps.argmax()) if overlaps.max(initial=0) >= iou else len(members)
        )
        if place == len(members):
            members.append([])
        members[place].append(row)
        holds[place, cloud[row]] = True
        mean = np.average(
            boxes[members[place]], axis=0, weights=weights[members[place]]
        )
        fused[place] = np.clip(
            mean, boxes[members[place]].min(0), boxes[members[place]].max(0)
        )
    return fused[: len(members)].astype(np.float32), members


def _ious(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """[M]"""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(1)
    union = (
        (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
    )
    ious: NDArray[np.float64] = np.divide(
        shared, union, out=np.zeros_like(shared), where=union > 0
    )
    return ious


def scored(raw: RawDetections, prior: Prior) -> RawDetections:
    """Labels without score get their measured precision as the score, or the assumed
    one.
    """
    if raw.score_kind != "none":
        return raw
    known = [
        prior.precision[k] if k < len(prior.precision) else None
        for k in range(raw.class_scores.shape[1])
    ]
    precision = np.array(
        [ASSUMED_PRECISION if p is None else p for p in known], np.float32
    )
    return replace(
        raw, class_scores=raw.class_scores * precision, score_kind="self_reported"
    )


def clip_contradicts(
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    clip_probs: NDArray[np.float32],
    rule: Ensemble,
) -> bool:
    """Whether CLIP names too many of an image's boxes otherwise than the cloud did:
    scores [N], labels [N], clip_probs [N, K+1].
    """
    judged = scores >= rule.doubt_score_min
    if not judged.any():
        return False
    contradicted = clip_probs[judged].argmax(1) != labels[judged]
    return bool(contradicted.mean() > rule.doubt_share)


def cloud_names(clouds: Sequence[Cloud]) -> tuple[str, ...]:
    """A name for each cloud: its service and its view, numbered where several have the
    same.
    """
    asked = [
        (
            cloud.service
            if cloud.views == (PLAIN_RENDERING,) or len(cloud.views) > 1
            else f"{cloud.service} {cloud.views[0]}"
        )
        for cloud in clouds
    ]
    counts, seen, names = Counter(asked), Counter[str](), []
    for name in asked:
        seen[name] += 1
        names.append(name if counts[name] == 1 else f"{name} {seen[name]}")
    return tuple(names)


class EnsembleClient:
    """``CloudClient.answer`` for several clouds. Use inside one event loop, and
    ``aclose`` at the end.

    An image is an error only if no cloud that was asked answered. What stops the run
    stops it, whichever cloud says it; an unreachable cloud does so only if no other one
    answers, and so does a spent budget or quota in ``failover``. ``clients`` are made
    with ``skip_unreachable``, and for ``failover`` with ``skip_over_budget``.
    """

    def __init__(
        self, clients: Sequence[CloudClient], names: Sequence[str], ensemble: Ensemble
    ) -> None:
        self.clients = tuple(clients)
        self._names = tuple(names)
        self._reliability = ensemble.reliability or (1.0,) * len(self.clients)
        self._ensemble = ensemble

    async def aclose(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self.clients))

    @property
    def views(self) -> tuple[tuple[int, str], ...]:
        """How each cloud gets an image."""
        return tuple(client.view for client in self.clients)

    async def check(self) -> None:
        """As ``CloudClient.check``; for ``failover`` it is enough if one can be
        reached.
        """
        found = await asyncio.gather(
            *(client.check() for client in self.clients), return_exceptions=True
        )
        problems = [problem for problem in found if problem is not None]
        enough = self._ensemble.mode == "failover" and len(problems) < len(found)
        for problem in problems:
            if not (enough and isinstance(problem, (CloudUnreachable, QuotaExhausted))):
                raise problem

    async def answer(self, *images: CanonicalImage) -> Answer:
        """What the clouds say about one image; ``images``: it as each of them gets it,
        or one for all.
        """
        if self._ensemble.mode == "failover":
            return await self._first_reached(self._each(images))
        return await self._of(
            range(1 if self._ensemble.mode == "cascade" else len(self.clients)),
            self._each(images),
        )

    async def second_opinion(self, *images: CanonicalImage) -> Answer:
        """What all clouds say, fused; the first one's answer is on record by now."""
        return await self._of(range(len(self.clients)), self._each(images))

    def _each(self, images: Sequence[CanonicalImage]) -> Sequence[CanonicalImage]:
        return images if len(images) > 1 else list(images) * len(self.clients)

    async def _of(self, asked: range, images: Sequence[CanonicalImage]) -> Answer:
        """All at once; if one stops the run, it does so when the others have finished:
        their calls may be paid.
        """
        found = await asyncio.gather(
            *(self.clients[i].answer(images[i]) for i in asked), return_exceptions=True
        )
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        return self._combined(
            [
                (i, answer)
                for i, answer in zip(asked, found, strict=True)
                if isinstance(answer, Answer)
            ]
        )

    async def _first_reached(self, images: Sequence[CanonicalImage]) -> Answer:
        """An answer on record is taken, whoever gave it. Open breakers are waited for
        only if nobody else answers; the spent are left out.
        """
        for i, client in enumerate(self.clients):
            known = await client.known(images[i])
            if known is not None:
                return self._combined([(i, known)])
        tried: list[tuple[int, Answer]] = []
        for patient in (False, True):
            for i, client in enumerate(self.clients):
                tried.append((i, await client.answer(images[i], patient=patient)))
                if tried[-1][1].raw is not None:
                    return self._combined(tried)
            statuses = {answer.status for _, answer in tried}
            if "error" in statuses or "unreachable" not in statuses:
                break
        return self._combined(tried)

    def _combined(self, said: Sequence[tuple[int, Answer]]) -> Answer:
        """One answer with everybody's calls and costs.

        If nobody could be asked, raises the error of the last cloud that is spent or,
        if none is, ``CloudUnreachable``.
        """
        heard = [(i, answer.raw) for i, answer in said if answer.raw is not None]
        last = {self._names[i]: answer.error for i, answer in said}
        problems = "; ".join(
            f"{name}: {error}" for name, error in last.items() if error
        )
        totals: dict[str, Any] = {
            "attempts": sum(answer.attempts for _, answer in said),
            "latency_ms": max(answer.latency_ms for _, answer in said),
            "cost_usd": sum(answer.cost_usd for _, answer in said),
            "calls": sum(answer.calls for _, answer in said),
            "error": problems or None,
            "teachers": tuple(self._names[i] for i, _ in heard),
        }
        if heard:
            raw = self._fused(heard)
            on_record = all(
                answer.status == "cached"
                for _, answer in said
                if answer.raw is not None
            )
            return Answer(
                "cached" if on_record else "ok" if len(raw) else "empty", raw, **totals
            )
        if any(answer.status == "error" for _, answer in said):
            return Answer("error", None, **totals)
        spent = [SPENT[answer.status] for _, answer in said if answer.status in SPENT]
        raise (spent[-1] if spent else CloudUnreachable)(problems)

    def _fused(self, heard: Sequence[tuple[int, RawDetections]]) -> RawDetections:
        if len(heard) == 1:
            return heard[0][1]
        answers = [scored(raw, self.clients[i].prior) for i, raw in heard]
        return fuse(
            answers, [self._reliability[i] for i, _ in heard], self._ensemble.iou
        )


Client = CloudClient | EnsembleClient


def create_client(
    config: PipelineConfig,
    urls: Sequence[str],
    journal: Journal,
    governors: Sequence[AsyncGovernor],
) -> Client:
    """The client of a configuration's cloud or clouds; ``urls`` and ``governors`` in
    the order of ``config.clouds``.
    """
    if len(config.clouds) == 1:
        return CloudClient(
            config.clouds[0], config.classes, urls[0], journal, governors[0]
        )
    failover = config.ensemble.mode == "failover"
    clients = [
        CloudClient(
            cloud,
            config.classes,
            url,
            journal,
            governor,
            skip_unreachable=True,
            skip_over_budget=failover,
        )
        for cloud, url, governor in zip(config.clouds, urls, governors, strict=True)
    ]
    return EnsembleClient(clients, cloud_names(config.clouds), config.ensemble)


def render_for_clouds(client: Client, data: bytes) -> list[CanonicalImage]:
    """A file's image as each cloud gets it alone, so that its answers are found again
    whoever else is asked. Raises ``InputError``.
    """
    views = client.views if isinstance(client, EnsembleClient) else (client.view,)
    made = {view: image_in_view(data, *view) for view in set(views)}
    return [made[view] for view in views]
