from __future__ import annotations

import asyncio
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud import question_client, shared_governor
from coin_ray.cloud.accounts import account_name, governor_limits
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.answer_fusion import fuse_answers, score_labels
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.ensemble import (
    EnsembleClient,
    clip_contradicts,
    cloud_names,
    create_client,
    render_for_clouds,
)
from coin_ray.cloud.governor import COOL_DOWN, WINDOW_MIN, Governor, LocalGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.protocol import RawDetections, ScoreKind
from coin_ray.cloud.services import adapter_for
from coin_ray.config import Cloud, Ensemble, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import AuthError, BudgetExhausted, CloudUnreachable, QuotaExhausted

from .conftest import (
    CLASSES,
    FakeTime,
    Reply,
    ScriptedService,
    SharedPerLoop,
    detection_json,
    ok_response,
    response_json,
    same_detections,
    solid_image,
    status_response,
)
from .emulator import PROVIDERS, Emulator, scene
from .emulator import app as emulated

NAMES = ("cheap", "dear")
Row = tuple[Sequence[float], Sequence[float]]


def _raw_detections(
    *rows: Row, kind: ScoreKind = "label", unmapped: tuple[str, ...] = ()
) -> RawDetections:
    num_classes = len(rows[0][1]) if rows else 3
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([scores for _, scores in rows], np.float32)
    return RawDetections(boxes, scores.reshape(-1, num_classes), kind, unmapped)


NUMBERS = st.integers(0, 40).map(float)
SCORES = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def _random_answers(
    draw: st.DrawFn,
    classes: int,
    kinds: Sequence[ScoreKind] = ("per_class", "label", "self_reported", "none"),
) -> RawDetections:
    """Draw boxes that often overlap and scores that often tie."""
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(NUMBERS), draw(NUMBERS)
        width, height = draw(NUMBERS) + 1, draw(NUMBERS) + 1
        scores = draw(st.lists(SCORES, min_size=classes, max_size=classes))
        rows.append(([x, y, x + width, y + height], scores))
    rows.sort(key=lambda row: -max(row[1]))
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    class_scores = np.array([scores for _, scores in rows], np.float32)
    unmapped = draw(st.lists(st.sampled_from(["a", "b"]), max_size=2))
    return RawDetections(
        boxes,
        class_scores.reshape(-1, classes),
        draw(st.sampled_from(kinds)),
        tuple(unmapped),
    )


@st.composite
def _random_teachers(draw: st.DrawFn) -> list[tuple[RawDetections, float]]:
    """Draw the answers of one to four clouds, each with its reliability."""
    classes = draw(st.integers(1, 3))
    reliabilities = st.sampled_from([0.25, 1.0, 3.0])
    teacher = st.tuples(_random_answers(classes), reliabilities)
    return draw(st.lists(teacher, min_size=1, max_size=4))


TEACHERS = _random_teachers()
IOUS = st.sampled_from([0.05, 0.3, 0.55, 1.0])


@given(st.integers(1, 3).flatmap(_random_answers), st.floats(0.01, 100), IOUS)
def test_one_cloud_is_itself(
    answer: RawDetections, reliability: float, iou: float
) -> None:
    assert same_detections(fuse_answers([answer], [reliability], iou), answer)


@given(
    st.integers(1, 3).flatmap(lambda k: _random_answers(k, ("label",))),
    st.integers(2, 4),
    IOUS,
)
def test_clouds_that_agree_are_one(
    answer: RawDetections, build_ensemble: int, iou: float
) -> None:
    """Boxes are equal, and scores up to rounding; boxes of one cloud are never merged,
    however much they overlap.
    """
    fused = fuse_answers([answer] * build_ensemble, [2.0] * build_ensemble, iou)
    assert len(fused) == len(answer)
    distinct_boxes = {box.tobytes() for box in answer.boxes}
    if len(distinct_boxes) == len(answer) and iou == 1:
        order = np.lexsort(answer.boxes.T)
        fused_order = np.lexsort(fused.boxes.T)
        assert np.array_equal(fused.boxes[fused_order], answer.boxes[order])
        fused_scores = fused.class_scores[fused_order]
        assert np.allclose(fused_scores, answer.class_scores[order], atol=1e-6)


@given(TEACHERS, IOUS, st.randoms(use_true_random=False))
def test_the_order_of_the_clouds_decides_nothing(
    teachers: list[tuple[RawDetections, float]], iou: float, random: Any
) -> None:
    shuffled = random.sample(teachers, len(teachers))
    assert same_detections(_fuse_teachers(teachers, iou), _fuse_teachers(shuffled, iou))


def _fuse_teachers(
    teachers: list[tuple[RawDetections, float]], iou: float
) -> RawDetections:
    answers, reliabilities = zip(*teachers, strict=True)
    return fuse_answers(answers, reliabilities, iou)


@given(TEACHERS, IOUS)
def test_fused_boxes_stay_among_their_members(
    teachers: list[tuple[RawDetections, float]], iou: float
) -> None:
    """Each side lies between the sides of the clouds' boxes, and the sum of scores is the
    weighted mean of the clouds' sums.
    """
    responses = [a for a, _ in teachers]
    reliabilities = np.array([r for _, r in teachers])
    fused = fuse_answers(responses, reliabilities.tolist(), iou)
    all_boxes = np.concatenate([a.boxes for a in responses])
    assert max(len(a) for a in responses) <= len(fused) <= len(all_boxes)
    assert len(fused) == 0 or (fused.boxes.min(0) >= all_boxes.min(0)).all()
    assert len(fused) == 0 or (fused.boxes.max(0) <= all_boxes.max(0)).all()
    assert (fused.boxes[:, 2:] > fused.boxes[:, :2]).all()
    assert ((fused.class_scores >= 0) & (fused.class_scores <= 1)).all()
    best = fused.class_scores.max(1, initial=0)
    assert (np.diff(best) <= 0).all()
    mass = sum(r / reliabilities.sum() * a.class_scores.sum(0) for a, r in teachers)
    assert np.allclose(fused.class_scores.sum(0), mass, atol=1e-4)
    assert sorted(fused.unmapped) == sorted(
        name for a in responses for name in a.unmapped
    )


def test_a_pair_by_hand() -> None:
    """Fuse with weights 2 x 0.6 and 1 x 0.8; the second cloud names another class."""
    first = _raw_detections(([0, 0, 10, 10], [0.6, 0, 0]))
    second = _raw_detections(([2, 0, 12, 10], [0, 0.8, 0]))
    fused = fuse_answers([first, second], [2, 1], 0.5)
    assert fused.boxes[0] == pytest.approx([0.8, 0, 10.8, 10])
    assert fused.class_scores[0] == pytest.approx([0.4, 0.8 / 3, 0])
    apart = fuse_answers([first, second], [2, 1], 0.7)
    assert apart.boxes.tolist() == [[0, 0, 10, 10], [2, 0, 12, 10]]
    assert apart.class_scores == pytest.approx(np.array([[0.4, 0, 0], [0, 0.8 / 3, 0]]))


def test_clouds_that_do_not_see_a_box_lower_its_score() -> None:
    one_box = _raw_detections(([0, 0, 9, 9], [0.9, 0, 0]))
    fused = fuse_answers(
        [one_box, _raw_detections(), _raw_detections()], [1, 1, 2], 0.5
    )
    assert fused.class_scores[0] == pytest.approx([0.225, 0, 0])


def test_one_class() -> None:
    first = _raw_detections(([0, 0, 10, 10], [0.6]))
    second = _raw_detections(([0, 0, 10, 10], [1.0]))
    fused = fuse_answers([first, second], [1, 1], 0.5)
    assert fused.class_scores.tolist() == [[pytest.approx(0.8)]]


def test_a_cloud_s_own_boxes_are_not_merged() -> None:
    crowd = _raw_detections(
        ([0, 0, 10, 10], [0.9, 0, 0]), ([1, 0, 11, 10], [0.8, 0, 0])
    )
    single_box = _raw_detections(([0, 0, 10, 10], [0.5, 0, 0]))
    assert len(fuse_answers([crowd, single_box], [1, 1], 0.5)) == 2


KIND_PAIRS = [
    ("per_class", "per_class", "per_class"),
    ("per_class", "label", "label"),
    ("self_reported", "label", "self_reported"),
    ("none", "label", "self_reported"),
]


@pytest.mark.parametrize(("first_kind", "second_kind", "expected"), KIND_PAIRS)
def test_fused_scores_are_of_the_worst_kind(
    first_kind: ScoreKind, second_kind: ScoreKind, expected: str
) -> None:
    first = _raw_detections(kind=first_kind)
    second = _raw_detections(kind=second_kind)
    assert fuse_answers([first, second], [1, 1], 0.5).score_kind == expected


def test_labels_without_score_are_scored_by_their_precision() -> None:
    unscored = _raw_detections(
        ([0, 0, 9, 9], [0, 1, 0]), ([0, 0, 9, 9], [1, 0, 0]), kind="none"
    )
    scored = score_labels(unscored, Prior(precision=(0.8, None, None)))
    assert scored.class_scores.tolist() == [[0, 0.5, 0], [pytest.approx(0.8), 0, 0]]
    assert scored.score_kind == "self_reported"
    label = _raw_detections(([0, 0, 9, 9], [0, 1, 0]))
    assert score_labels(label, Prior(precision=(0.8, 0.8, 0.8))) is label


DOUBTS = [
    ([0.9, 0.8], [0, 1], [[0.9, 0, 0.1], [0.1, 0.8, 0.1]], 0.0, False),
    ([0.9, 0.8], [0, 1], [[0.9, 0, 0.1], [0.8, 0.1, 0.1]], 0.0, True),
    ([0.9, 0.8], [0, 1], [[0.9, 0, 0.1], [0.1, 0.1, 0.8]], 0.0, True),
    ([0.9, 0.8], [0, 1], [[0.9, 0, 0.1], [0.8, 0.1, 0.1]], 0.5, False),
    ([0.9, 0.2], [0, 1], [[0.9, 0, 0.1], [0.8, 0.1, 0.1]], 0.0, False),
    ([0.2, 0.1], [0, 1], [[0, 0.9, 0.1], [0.8, 0.1, 0.1]], 0.0, False),
    ([], [], [], 0.0, False),
]


@pytest.mark.parametrize(("scores", "labels", "probs", "share", "expected"), DOUBTS)
def test_doubts(
    scores: list[float],
    labels: list[int],
    probs: list[list[float]],
    share: float,
    expected: bool,
) -> None:
    rule = Ensemble("cascade", doubt_score_min=0.25, doubt_share=share)
    arrays = (
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        np.array(probs, np.float32).reshape(-1, 3),
    )
    assert clip_contradicts(*arrays, rule) is expected


def test_names() -> None:
    assert cloud_names(
        [Cloud(url="https://a"), Cloud(service="dino-x"), Cloud(url="https://b")]
    ) == ("http 1", "dino-x", "http 2")


class _EnsembleHarness:
    """Clouds with scripted replies, each at its own address, behind one ``EnsembleClient``
    and one journal.
    """

    def __init__(
        self,
        journal: Journal,
        ensemble: Ensemble,
        replies: Sequence[Sequence[Reply]],
        settings: Sequence[dict[str, Any]],
        *,
        is_shared: bool,
    ) -> None:
        self.is_shared = is_shared
        self.time = FakeTime()
        self.journal = journal
        self.services = [ScriptedService(list(scripted)) for scripted in replies]
        self.governors: list[Governor] = []
        clients = []
        for number, service in enumerate(self.services):
            cloud_settings = settings[number] if settings else {}
            cloud = Cloud(
                **{
                    "url": f"https://{NAMES[number]}.example.com",
                    "rate": 1000.0,
                    "deadline": 60.0,
                    **cloud_settings,
                }
            )
            account = account_name(cloud, cloud.url, adapter_for(cloud))
            spent = journal.spent(account)
            governor = Governor(governor_limits(cloud), spent, self.time)
            self.governors.append(governor)
            skip_over_budget = ensemble.mode == "failover"
            client = self.client(
                cloud, service, governor, skip_over_budget=skip_over_budget
            )
            clients.append(client)
        self.ensemble = EnsembleClient(clients, NAMES, ensemble)

    def client(
        self,
        cloud: Cloud,
        service: ScriptedService,
        governor: Governor,
        *,
        skip_over_budget: bool,
    ) -> CloudClient:
        return CloudClient(
            cloud,
            CLASSES,
            cloud.url,
            self.journal,
            SharedPerLoop(governor) if self.is_shared else LocalGovernor(governor),
            transport=httpx.MockTransport(service),
            skip_unreachable=True,
            skip_over_budget=skip_over_budget,
            sleep=self.time.sleep,
            clock=self.time,
            uniform=lambda low, high: high,
        )

    def query(self, *images: CanonicalImage, second: bool = False) -> list[Answer]:
        """Query about images at once."""
        query = self.ensemble.second_opinion if second else self.ensemble.answer

        async def query_all() -> list[Answer]:
            return list(await asyncio.gather(*map(query, images)))

        return asyncio.run(query_all())

    @property
    def requests(self) -> list[int]:
        return [len(service.requests) for service in self.services]


HarnessBuilder = Callable[..., _EnsembleHarness]


@pytest.fixture(params=["own governors", "shared governors"])
def build_ensemble(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> HarnessBuilder:
    """Return a function that builds an ensemble. Its governors are its own, or those of
    several cloud actors.
    """
    monkeypatch.setattr(shared_governor, "GROUP_SECONDS", 0.0)

    def build(
        *replies: Sequence[Reply],
        settings: Sequence[dict[str, Any]] = (),
        **ensemble: Any,
    ) -> _EnsembleHarness:
        return _EnsembleHarness(
            open_journal(str(tmp_path / "journal")),
            Ensemble(**ensemble),
            replies,
            settings,
            is_shared=request.param == "shared governors",
        )

    return build


CAR = ok_response(detection_json("car", 0.8, (0, 0, 20, 20)))
BUS = ok_response(
    detection_json("bus", 0.6, (0, 0, 20, 20)),
    detection_json("dog", 0.4, (30, 0, 50, 20)),
)
PRICES = [{"usd_per_call": 0.01}, {"usd_per_call": 0.5}]


def test_all_are_asked_and_fused(build_ensemble: HarnessBuilder) -> None:
    harness = build_ensemble([CAR], [BUS], settings=PRICES, reliability=(3.0, 1.0))
    (answer,) = harness.query(solid_image())
    assert answer.raw is not None
    assert (answer.status, answer.teachers) == ("ok", NAMES)
    assert (answer.calls, answer.attempts, answer.error) == (2, 2, None)
    assert answer.cost_usd == pytest.approx(0.51)
    expected = np.array([[0.6, 0.15, 0], [0, 0, 0.1]])
    assert answer.raw.class_scores == pytest.approx(expected)
    assert harness.requests == [1, 1]


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_the_same_again_makes_no_call(
    build_ensemble: HarnessBuilder, mode: str
) -> None:
    images = [solid_image(i) for i in range(4)]
    harness = build_ensemble([CAR], [BUS], mode=mode)
    first_answers = harness.query(*images)
    if mode == "cascade":
        first_answers += harness.query(images[0], second=True)
    unavailable = [status_response(500)]
    repeated = build_ensemble(unavailable, unavailable, mode=mode)
    repeated_answers = repeated.query(*images)
    if mode == "cascade":
        repeated_answers += repeated.query(images[0], second=True)
    assert repeated.requests == [0, 0]
    assert {a.status for a in repeated_answers} == {"cached"}
    assert [(a.calls, a.cost_usd) for a in repeated_answers] == [(0, 0)] * len(
        repeated_answers
    )
    for first_answer, repeated_answer in zip(
        first_answers, repeated_answers, strict=True
    ):
        assert first_answer.raw is not None
        assert repeated_answer.raw is not None
        assert same_detections(first_answer.raw, repeated_answer.raw)
        assert first_answer.teachers == repeated_answer.teachers


def test_an_image_is_an_error_only_if_nobody_answered(
    build_ensemble: HarnessBuilder,
) -> None:
    rejected = status_response(415, title="not an image")
    (half,) = build_ensemble([rejected], [BUS]).query(solid_image(1))
    assert (half.status, half.teachers, half.calls) == ("ok", ("dear",), 1)
    assert half.raw is not None
    # of one cloud that answered, as it is
    assert half.raw.class_scores.max() == pytest.approx(0.6)
    assert str(half.error).startswith("cheap: ImageRejected")
    (none,) = build_ensemble([rejected], [rejected]).query(solid_image(2))
    assert (none.status, none.raw, none.teachers) == ("error", None, ())
    assert "cheap: ImageRejected" in str(none.error)
    assert "dear: ImageRejected" in str(none.error)


def test_two_proved_absences(build_ensemble: HarnessBuilder) -> None:
    nothing = httpx.Response(200, json=response_json())
    (answer,) = build_ensemble([nothing], [nothing]).query(solid_image())
    assert (answer.status, answer.teachers) == ("empty", NAMES)


@pytest.mark.parametrize("mode", ["fuse", "failover"])
def test_a_wrong_key_stops_the_run_and_what_was_paid_is_kept(
    build_ensemble: HarnessBuilder, mode: str
) -> None:
    harness = build_ensemble([status_response(401)], [BUS], mode=mode)
    with pytest.raises(AuthError):
        harness.query(solid_image())
    assert harness.requests == [1, int(mode == "fuse")]
    assert harness.journal.contents().answers == int(mode == "fuse")


@pytest.mark.parametrize("number", [0, 1])
def test_fusing_stops_at_a_spent_budget_whoever_s_it_is(
    build_ensemble: HarnessBuilder, number: int
) -> None:
    harness = build_ensemble(
        [CAR],
        [BUS],
        settings=[{"max_calls": 3} if i == number else {} for i in range(2)],
    )
    with pytest.raises(BudgetExhausted, match=r"3 calls of cloud\.max_calls=3"):
        harness.query(*[solid_image(i) for i in range(6)])
    assert harness.requests[number] == 3
    assert harness.governors[1 - number].stats().calls != 3


LIMITS = [
    ({"max_calls": 3}, "cheap: 3 calls of cloud.max_calls=3 are spent"),
    (
        {"max_usd": 0.03, "usd_per_call": 0.01},
        "cheap: 0.0300 of cloud.max_usd=0.03 USD are spent",
    ),
    ({"per_day": 3}, "cheap: cloud.per_day=3 calls were made in 24 hours"),
]


@pytest.mark.parametrize(("limit", "message"), LIMITS)
def test_failover_when_the_first_one_s_budget_is_spent(
    build_ensemble: HarnessBuilder, limit: dict[str, Any], message: str
) -> None:
    harness = build_ensemble([CAR], [BUS], mode="failover", settings=[limit, {}])
    answers = [harness.query(solid_image(i))[0] for i in range(6)]
    assert [a.teachers for a in answers] == [("cheap",)] * 3 + [("dear",)] * 3
    assert [a.calls for a in answers] == [1] * 6
    assert harness.requests == [3, 3]
    assert str(answers[-1].error).startswith(message)
    assert harness.time.slept == []


def test_failover_with_many_under_way_when_the_first_one_s_budget_is_spent(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble(
        [CAR], [BUS], mode="failover", settings=[{"max_calls": 7}, {}]
    )
    answers = harness.query(*[solid_image(i) for i in range(20)])
    assert Counter(a.teachers for a in answers) == {
        ("cheap",): 7,
        ("dear",): 13,
    }
    assert harness.requests == [7, 13]
    assert harness.journal.spent()[0] == 20


NO_QUOTA = status_response(402, title="the quota is used up")


def test_failover_when_the_first_one_s_quota_is_spent(
    build_ensemble: HarnessBuilder,
) -> None:
    """The first cloud gets no more requests; its earlier paid call for an image counts."""
    harness = build_ensemble(
        [CAR, CAR, status_response(500), NO_QUOTA, CAR],
        [BUS],
        mode="failover",
        settings=PRICES,
    )
    answers = [harness.query(solid_image(i))[0] for i in range(6)]
    assert [a.teachers for a in answers] == [("cheap",)] * 2 + [("dear",)] * 4
    assert harness.requests == [4, 4]
    assert [a.calls for a in answers] == [1, 1, 2, 1, 1, 1]
    assert sum(a.calls for a in answers) == harness.journal.spent()[0]
    assert sum(a.cost_usd for a in answers) == pytest.approx(harness.journal.spent()[1])
    assert "cheap: the service answered 402" in str(answers[-1].error)


def test_images_that_wait_for_a_place_do_not_ask_for_a_quota_that_is_gone(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble(
        [NO_QUOTA], [BUS], mode="failover", settings=[{"in_flight": 1}, {}]
    )
    answers = harness.query(*(solid_image(i) for i in range(6)))
    assert [a.teachers for a in answers] == [("dear",)] * 6
    assert harness.requests == [1, 6]


TWO, NONE = {"max_calls": 2}, dict[str, Any]()
GONE = httpx.ConnectError("refused")
ALL_SPENT = [
    (
        [CAR],
        [BUS],
        TWO,
        TWO,
        BudgetExhausted,
        "cheap: 2 calls of .*; dear: 2 calls of ",
        4,
    ),
    (
        [CAR, CAR, NO_QUOTA],
        [BUS],
        NONE,
        TWO,
        BudgetExhausted,
        "cheap: the service answered 402: .*; dear: 2 calls of ",
        4,
    ),
    (
        [CAR],
        [BUS, BUS, NO_QUOTA],
        TWO,
        NONE,
        QuotaExhausted,
        "cheap: 2 calls of .*; dear: the service answered 402",
        4,
    ),
    (
        [CAR],
        [GONE],
        TWO,
        NONE,
        BudgetExhausted,
        "cheap: 2 calls of .*; dear: CloudUnreachable: ",
        2,
    ),
    (
        [GONE],
        [BUS],
        NONE,
        TWO,
        BudgetExhausted,
        "cheap: CloudUnreachable: .*; dear: 2 calls of ",
        2,
    ),
]


@pytest.mark.parametrize(
    (
        "first_replies",
        "second_replies",
        "first_settings",
        "second_settings",
        "kind",
        "text",
        "answered",
    ),
    ALL_SPENT,
)
def test_failover_ends_when_nobody_is_left(
    build_ensemble: HarnessBuilder,
    first_replies: list[Reply],
    second_replies: list[Reply],
    first_settings: dict[str, Any],
    second_settings: dict[str, Any],
    kind: type[Exception],
    text: str,
    answered: int,
) -> None:
    harness = build_ensemble(
        first_replies,
        second_replies,
        mode="failover",
        settings=[first_settings, second_settings],
    )
    for i in range(answered):
        assert harness.query(solid_image(i))[0].raw is not None
    with pytest.raises(kind, match=text):
        harness.query(solid_image(answered))
    larger_budget = build_ensemble(
        [CAR], [BUS], mode="failover", settings=[{"max_calls": 3}, NONE]
    )
    images = [solid_image(i) for i in range(answered)]
    assert {answer.status for answer in larger_budget.query(*images)} == {"cached"}
    assert larger_budget.query(solid_image(answered))[0].status == "ok"


def test_an_image_that_only_a_spent_cloud_could_answer_is_an_error_and_others_go_on(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble(
        [status_response(415, title="not an image"), CAR],
        [BUS],
        mode="failover",
        settings=[NONE, {"max_calls": 0}],
    )
    rejected, accepted = (harness.query(solid_image(i))[0] for i in range(2))
    assert rejected.status == "error"
    assert "cheap: ImageRejected" in str(rejected.error)
    assert "dear: 0 calls of cloud.max_calls=0" in str(rejected.error)
    assert (accepted.status, accepted.teachers) == ("ok", ("cheap",))


def test_an_open_breaker_is_waited_for_where_the_others_are_spent(
    build_ensemble: HarnessBuilder,
) -> None:
    dear = _SwitchedReply(BUS)
    harness = build_ensemble(
        [CAR], [dear], mode="failover", settings=[{"max_calls": 1}, {"attempts": 1}]
    )
    assert harness.query(solid_image(0))[0].teachers == ("cheap",)
    for i in range(1, WINDOW_MIN + 1):
        assert harness.query(solid_image(i))[0].status == "error"
    dear.up = True
    assert harness.query(solid_image(40))[0].teachers == ("dear",)
    assert sum(harness.time.slept) == pytest.approx(COOL_DOWN)


def test_a_wrong_key_stops_the_run_also_where_the_others_are_spent(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble(
        [CAR], [status_response(401)], mode="failover", settings=[{"max_calls": 1}, {}]
    )
    harness.query(solid_image(0))
    with pytest.raises(AuthError):
        harness.query(solid_image(1))


def _create_client(
    config: PipelineConfig, journal_folder: Path
) -> CloudClient | EnsembleClient:
    governors = [
        LocalGovernor(Governor(governor_limits(cloud))) for cloud in config.clouds
    ]
    urls = [cloud.url for cloud in config.clouds]
    return create_client(config, urls, open_journal(str(journal_folder)), governors)


@pytest.mark.parametrize("mode", ["fuse", "failover"])
def test_a_configuration_s_clients_hand_over_only_in_failover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        return NO_QUOTA if request.url.host == "a" else BUS

    mocked_client = functools.partial(CloudClient, transport=httpx.MockTransport(reply))
    monkeypatch.setattr(question_client, "CloudClient", mocked_client)
    config = replace(
        folder(),
        classes=CLASSES,
        cloud=Cloud(url="https://a"),
        more_clouds=(Cloud(url="https://b"),),
        ensemble=Ensemble(mode),  # type: ignore[arg-type]
    )
    client = _create_client(config, tmp_path)
    if mode == "failover":
        assert asyncio.run(client.answer(solid_image())).teachers == ("http 2",)
    else:
        with pytest.raises(QuotaExhausted):
            asyncio.run(client.answer(solid_image()))


def test_budgets_add_up_over_runs_by_account(build_ensemble: HarnessBuilder) -> None:
    first = build_ensemble([CAR], [BUS], settings=PRICES)
    first.query(solid_image(0), solid_image(1))
    accounts = [client._account for client in first.ensemble.clients]
    cheap_account, dear_account = accounts
    assert first.journal.spent(cheap_account) == pytest.approx((2, 0.02))
    assert first.journal.spent(dear_account) == pytest.approx((2, 1.0))
    limits = [{"max_calls": 3}, {"max_calls": 9}]
    build_ensemble([CAR], [BUS], settings=limits).query(solid_image(2))
    third = build_ensemble([CAR], [BUS], settings=limits)
    with pytest.raises(BudgetExhausted, match=r"3 calls of cloud\.max_calls=3"):
        third.query(solid_image(3))


def test_failover_asks_the_first_while_it_answers(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble([CAR], [BUS], mode="failover")
    answers = harness.query(*[solid_image(i) for i in range(5)])
    assert {answer.teachers for answer in answers} == {("cheap",)}
    assert harness.requests == [5, 0]


class _SwitchedReply:
    """A reply of status 500, which may be billed, until the service is ``up``."""

    def __init__(self, reply: httpx.Response) -> None:
        self.up = False
        self.reply = reply

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.up:
            return status_response(500)
        return httpx.Response(
            200, headers=self.reply.headers, content=self.reply.content
        )


ONCE = [{"attempts": 1, "usd_per_call": 0.01}, {"attempts": 1, "usd_per_call": 0.5}]


def test_failover_when_the_breaker_opens_and_back(
    build_ensemble: HarnessBuilder,
) -> None:
    cheap = _SwitchedReply(CAR)
    harness = build_ensemble([cheap], [BUS], mode="failover", settings=ONCE)
    answers = [harness.query(solid_image(i))[0] for i in range(30)]
    assert {(a.status, a.teachers) for a in answers} == {("ok", ("dear",))}
    assert harness.requests == [WINDOW_MIN, 30]
    calls, usd = harness.journal.spent()
    assert sum(answer.calls for answer in answers) == calls == WINDOW_MIN + 30
    assert usd == pytest.approx(WINDOW_MIN * 0.01 + 15)
    assert sum(answer.cost_usd for answer in answers) == pytest.approx(usd)
    assert harness.time.slept == []  # nobody waited for the breaker
    cheap.up = True
    harness.time.now += COOL_DOWN
    assert harness.query(solid_image(31))[0].teachers == ("cheap",)
    assert harness.governors[0].stats().breaker == "closed"


def test_an_open_breaker_is_waited_for_where_nobody_else_answers(
    build_ensemble: HarnessBuilder,
) -> None:
    cheap = _SwitchedReply(CAR)
    harness = build_ensemble(
        [cheap], [status_response(500)], mode="failover", settings=ONCE
    )
    for i in range(WINDOW_MIN):
        assert harness.query(solid_image(i))[0].status == "error"
    cheap.up = True
    before = harness.time.now
    (answer,) = harness.query(solid_image(40))
    assert (answer.status, answer.teachers) == ("ok", ("cheap",))
    assert harness.time.now == pytest.approx(before + COOL_DOWN)
    assert harness.requests == [WINDOW_MIN + 1, WINDOW_MIN]


def test_fusing_waits_for_an_open_breaker(build_ensemble: HarnessBuilder) -> None:
    """A hiccup of one cloud does not change what the student learns from."""
    cheap = _SwitchedReply(CAR)
    harness = build_ensemble([cheap], [BUS], settings=ONCE)
    answers = [harness.query(solid_image(i))[0] for i in range(WINDOW_MIN)]
    assert {answer.teachers for answer in answers} == {("dear",)}
    cheap.up = True
    assert harness.query(solid_image(40))[0].teachers == NAMES


def test_failover_takes_an_answer_on_record_whoever_gave_it(
    build_ensemble: HarnessBuilder,
) -> None:
    build_ensemble([status_response(415)], [BUS], mode="failover").query(solid_image())
    harness = build_ensemble([CAR], [status_response(500)], mode="failover")
    (answer,) = harness.query(solid_image())
    assert (answer.status, answer.teachers) == ("cached", ("dear",))
    assert harness.requests == [0, 0]


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_nobody_can_be_reached(build_ensemble: HarnessBuilder, mode: str) -> None:
    gone = [httpx.ConnectError("refused")]
    harness = build_ensemble(gone, gone, mode=mode)
    with pytest.raises(CloudUnreachable, match="cheap: CloudUnreachable"):
        harness.query(*[solid_image(i) for i in range(40)])


def test_fusing_goes_on_without_a_cloud_that_can_t_be_reached(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble(
        [CAR], [httpx.ConnectError("refused")], settings=[{}, {"attempts": 2}]
    )
    answers = harness.query(*[solid_image(i) for i in range(8)])
    assert {a.teachers for a in answers} == {("cheap",)}
    assert {a.status for a in answers} == {"ok"}
    assert "dear: CloudUnreachable" in str(answers[0].error)
    assert harness.journal.spent()[0] == 8


def test_a_cascade_asks_the_dear_one_only_for_a_second_opinion(
    build_ensemble: HarnessBuilder,
) -> None:
    harness = build_ensemble([CAR], [BUS], mode="cascade", settings=PRICES)
    images = [solid_image(i) for i in range(4)]
    first = harness.query(*images)
    assert harness.requests == [4, 0]
    assert {a.teachers for a in first} == {("cheap",)}
    (second,) = harness.query(images[2], second=True)
    assert harness.requests == [4, 1]
    assert (second.status, second.teachers) == ("ok", NAMES)
    assert (second.calls, second.cost_usd) == (1, 0.5)
    assert second.raw is not None
    assert second.raw.class_scores[0] == pytest.approx([0.4, 0.3, 0])


CHECKS = [
    ("fuse", [status_response(200)], [status_response(200)], None),
    ("fuse", [status_response(200)], [httpx.ConnectError("refused")], CloudUnreachable),
    ("failover", [status_response(200)], [httpx.ConnectError("refused")], None),
    (
        "failover",
        [httpx.ConnectError("refused")],
        [httpx.ConnectError("refused")],
        CloudUnreachable,
    ),
    ("failover", [status_response(200)], [status_response(401)], AuthError),
    ("failover", [NO_QUOTA], [status_response(200)], None),
    ("failover", [NO_QUOTA], [NO_QUOTA], QuotaExhausted),
    ("fuse", [NO_QUOTA], [status_response(200)], QuotaExhausted),
]


@pytest.mark.parametrize(("mode", "first_replies", "second_replies", "kind"), CHECKS)
def test_every_cloud_is_checked(
    build_ensemble: HarnessBuilder,
    mode: str,
    first_replies: list[Reply],
    second_replies: list[Reply],
    kind: type[Exception] | None,
) -> None:
    harness = build_ensemble(first_replies, second_replies, mode=mode)
    if kind is None:
        asyncio.run(harness.ensemble.check())
    else:
        with pytest.raises(kind):
            asyncio.run(harness.ensemble.check())


def test_two_services_of_different_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fuse a service of tasks that downsizes and a service with its own names; the emulator
    shows both the same scene.
    """
    for name in ("DDS_API_TOKEN", "GOOGLE_VISION_API_KEY"):
        monkeypatch.setenv(name, emulated.TOKEN)
    labels = tmp_path / "map.yaml"
    labels.write_text("service: google-vision\nmap: {Car: car, Bus: bus, Dog: dog}\n")
    server = Emulator(PROVIDERS)
    google_url = server.url("google-vision")
    clouds = (
        Cloud(service="dino-x", url=server.url("dds")),
        Cloud(service="google-vision", url=google_url, label_map=str(labels)),
    )
    boxes = [(40, 60, 1200, 900), (1500, 200, 1900, 700)]
    image_file = scene([0, 2], boxes, (2000, 1000))
    clock = FakeTime()

    async def query() -> Answer:
        journal = open_journal(str(tmp_path / "journal"))
        clients = [
            CloudClient(
                cloud,
                CLASSES,
                cloud.url,
                journal,
                LocalGovernor(Governor(governor_limits(cloud))),
                transport=server.transport(),
                sleep=clock.sleep,
            )
            for cloud in clouds
        ]
        client = EnsembleClient(clients, cloud_names(clouds), folder().ensemble)
        images = render_for_clouds(client, image_file)
        assert [image.width for image in images] == [1536, 2000]
        return await client.answer(*images)

    answer = asyncio.run(query())
    assert answer.teachers == ("dino-x", "google-vision")
    assert (answer.status, answer.calls) == ("ok", 2)
    assert answer.raw is not None
    assert answer.raw.boxes == pytest.approx(np.array(boxes, np.float32), abs=1.5)
    assert answer.raw.class_scores.argmax(1).tolist() == [0, 2]
    assert answer.raw.class_scores[0, 0] == pytest.approx(0.99)


def test_an_image_is_made_for_each_cloud_as_for_it_alone(tmp_path: Path) -> None:
    image_file = scene([0], [(40, 60, 1200, 900)], (2000, 1000), "JPEG")
    small = Cloud(url="https://a", max_side=512)
    others = (Cloud(url="https://b"), Cloud(url="https://c", max_side=512))
    config = replace(folder(), classes=CLASSES, cloud=small, more_clouds=others)
    client = _create_client(config, tmp_path)
    images = render_for_clouds(client, image_file)
    assert [image.data for image in images] == [
        canonical_image(image_file, side).data for side in (512, 4096, 512)
    ]
    alone = _create_client(replace(config, more_clouds=()), tmp_path)
    assert isinstance(alone, CloudClient)
    assert render_for_clouds(alone, image_file) == [canonical_image(image_file, 512)]


def test_more_clouds_cost_little_time() -> None:
    """Some hundred boxes of three clouds are fused well below the time of a call."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 500, (3, 300, 2))
    responses = []
    for upper_left in corners:
        boxes = np.concatenate([upper_left, upper_left + 40], 1).astype(np.float32)
        scores = generator.uniform(0, 1, (300, 5)).astype(np.float32)
        responses.append(RawDetections(boxes, scores, "label"))
    for order in itertools.permutations(range(3)):
        fused = fuse_answers([responses[i] for i in order], [1, 1, 1], 0.55)
    assert 300 <= len(fused) <= 900
