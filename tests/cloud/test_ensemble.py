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

from coin_ray.cloud import ensemble as ensemble_module
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
from coin_ray.config import Cloud, Ensemble
from coin_ray.config.presets import folder
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import AuthError, BudgetExhausted, CloudUnreachable, QuotaExhausted

from .conftest import (
    CLASSES,
    FakeTime,
    Reply,
    ScriptedService,
    detection_json,
    ok_response,
    response_json,
    solid_image,
    status_response,
)
from .emulator import PROVIDERS, Emulator, scene
from .emulator import app as emulated

NAMES = ("cheap", "dear")
Row = tuple[Sequence[float], Sequence[float]]


def raw(
    *rows: Row, kind: ScoreKind = "label", unmapped: tuple[str, ...] = ()
) -> RawDetections:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([row for _, row in rows], np.float32).reshape(
        -1, len(rows[0][1]) if rows else 3
    )
    return RawDetections(boxes, scores, kind, unmapped)


def same(one: RawDetections, other: RawDetections) -> bool:
    equal = np.array_equal(one.boxes, other.boxes) and np.array_equal(
        one.class_scores, other.class_scores
    )
    return equal and (one.score_kind, one.unmapped) == (
        other.score_kind,
        other.unmapped,
    )


NUMBERS = st.integers(0, 40).map(float)
SCORES = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def answers(
    draw: st.DrawFn,
    classes: int,
    kinds: Sequence[ScoreKind] = ("per_class", "label", "self_reported", "none"),
) -> RawDetections:
    """Boxes that often overlap, and often tie."""
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x, y, width, height = (
            draw(NUMBERS),
            draw(NUMBERS),
            draw(NUMBERS) + 1,
            draw(NUMBERS) + 1,
        )
        rows.append(
            (
                [x, y, x + width, y + height],
                draw(st.lists(SCORES, min_size=classes, max_size=classes)),
            )
        )
    rows.sort(key=lambda row: -max(row[1]))
    boxes = np.array([b for b, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([s for _, s in rows], np.float32).reshape(-1, classes)
    return RawDetections(
        boxes,
        scores,
        draw(st.sampled_from(kinds)),
        tuple(draw(st.lists(st.sampled_from(["a", "b"]), max_size=2))),
    )


TEACHERS = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.tuples(answers(k), st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=4
    )
)
IOUS = st.sampled_from([0.05, 0.3, 0.55, 1.0])


@given(st.integers(1, 3).flatmap(answers), st.floats(0.01, 100), IOUS)
def test_one_cloud_is_itself(
    answer: RawDetections, reliability: float, iou: float
) -> None:
    assert same(fuse_answers([answer], [reliability], iou), answer)


@given(
    st.integers(1, 3).flatmap(lambda k: answers(k, ("label",))), st.integers(2, 4), IOUS
)
def test_clouds_that_agree_are_one(
    answer: RawDetections, clouds: int, iou: float
) -> None:
    """Boxes, and scores up to rounding; a cloud's boxes stay as many as they are,
    however much they overlap."""
    fused = fuse_answers([answer] * clouds, [2.0] * clouds, iou)
    assert len(fused) == len(answer)
    if len({b.tobytes() for b in answer.boxes}) == len(answer) and iou == 1:
        order = np.lexsort(answer.boxes.T), np.lexsort(fused.boxes.T)
        assert np.array_equal(fused.boxes[order[1]], answer.boxes[order[0]])
        assert np.allclose(
            fused.class_scores[order[1]], answer.class_scores[order[0]], atol=1e-6
        )


@given(TEACHERS, IOUS, st.randoms(use_true_random=False))
def test_the_order_of_the_clouds_decides_nothing(
    teachers: list[tuple[RawDetections, float]], iou: float, random: Any
) -> None:
    shuffled = random.sample(teachers, len(teachers))
    one, other = (
        fuse_answers([a for a, _ in some], [r for _, r in some], iou)
        for some in (teachers, shuffled)
    )
    assert same(one, other)


@given(TEACHERS, IOUS)
def test_fused_boxes_stay_among_their_members(
    teachers: list[tuple[RawDetections, float]], iou: float
) -> None:
    """Each side lies between sides of boxes that were given, and the mass of scores is
    the weighted mean of everybody's."""
    said = [a for a, _ in teachers]
    trust = np.array([r for _, r in teachers])
    fused = fuse_answers(said, trust.tolist(), iou)
    everything = np.concatenate([a.boxes for a in said])
    assert max(len(a) for a in said) <= len(fused) <= len(everything)
    assert len(fused) == 0 or (fused.boxes.min(0) >= everything.min(0)).all()
    assert len(fused) == 0 or (fused.boxes.max(0) <= everything.max(0)).all()
    assert (fused.boxes[:, 2:] > fused.boxes[:, :2]).all()
    assert ((fused.class_scores >= 0) & (fused.class_scores <= 1)).all()
    best = fused.class_scores.max(1, initial=0)
    assert (np.diff(best) <= 0).all()
    mass = sum(r / trust.sum() * a.class_scores.sum(0) for a, r in teachers)
    assert np.allclose(fused.class_scores.sum(0), mass, atol=1e-4)
    assert sorted(fused.unmapped) == sorted(name for a in said for name in a.unmapped)


def test_a_pair_by_hand() -> None:
    """Weights 2 x 0.6 and 1 x 0.8; the second cloud names another class."""
    one, two = raw(([0, 0, 10, 10], [0.6, 0, 0])), raw(([2, 0, 12, 10], [0, 0.8, 0]))
    fused = fuse_answers([one, two], [2, 1], 0.5)
    assert fused.boxes[0] == pytest.approx([0.8, 0, 10.8, 10])
    assert fused.class_scores[0] == pytest.approx([0.4, 0.8 / 3, 0])
    apart = fuse_answers([one, two], [2, 1], 0.7)
    assert apart.boxes.tolist() == [[0, 0, 10, 10], [2, 0, 12, 10]]
    assert apart.class_scores == pytest.approx(np.array([[0.4, 0, 0], [0, 0.8 / 3, 0]]))


def test_who_did_not_see_a_box_lowers_its_score() -> None:
    fused = fuse_answers([raw(([0, 0, 9, 9], [0.9, 0, 0])), raw(), raw()], [1, 1, 2], 0.5)
    assert fused.class_scores[0] == pytest.approx([0.225, 0, 0])


def test_one_class() -> None:
    fused = fuse_answers(
        [raw(([0, 0, 10, 10], [0.6])), raw(([0, 0, 10, 10], [1.0]))], [1, 1], 0.5
    )
    assert fused.class_scores.tolist() == [[pytest.approx(0.8)]]


def test_a_cloud_s_own_boxes_are_not_joined() -> None:
    crowd = raw(([0, 0, 10, 10], [0.9, 0, 0]), ([1, 0, 11, 10], [0.8, 0, 0]))
    assert len(fuse_answers([crowd, raw(([0, 0, 10, 10], [0.5, 0, 0]))], [1, 1], 0.5)) == 2


KIND_PAIRS = [
    ("per_class", "per_class", "per_class"),
    ("per_class", "label", "label"),
    ("self_reported", "label", "self_reported"),
    ("none", "label", "self_reported"),
]


@pytest.mark.parametrize(("one", "two", "expected"), KIND_PAIRS)
def test_fused_scores_are_of_the_worst_kind(
    one: ScoreKind, two: ScoreKind, expected: str
) -> None:
    assert fuse_answers([raw(kind=one), raw(kind=two)], [1, 1], 0.5).score_kind == expected


def test_labels_without_score_are_scored_by_their_precision() -> None:
    bare = raw(([0, 0, 9, 9], [0, 1, 0]), ([0, 0, 9, 9], [1, 0, 0]), kind="none")
    found = score_labels(bare, Prior(precision=(0.8, None, None)))
    assert found.class_scores.tolist() == [[0, 0.5, 0], [pytest.approx(0.8), 0, 0]]
    assert found.score_kind == "self_reported"
    label = raw(([0, 0, 9, 9], [0, 1, 0]))
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


class EnsembleHarness:
    """Clouds with scripted replies, each at an address of its own, behind one
    ``EnsembleClient`` and one journal."""

    def __init__(
        self,
        journal: Journal,
        ensemble: Ensemble,
        replies: Sequence[Sequence[Reply]],
        settings: Sequence[dict[str, Any]],
    ) -> None:
        self.time = FakeTime()
        self.journal = journal
        self.services = [ScriptedService(list(some)) for some in replies]
        self.governors: list[Governor] = []
        clients = []
        for number, service in enumerate(self.services):
            more = settings[number] if settings else {}
            cloud = Cloud(
                **{
                    "url": f"https://{NAMES[number]}.example.com",
                    "rate": 1000.0,
                    "deadline": 60.0,
                    **more,
                }
            )
            account = account_name(cloud, cloud.url, adapter_for(cloud))
            self.governors.append(
                Governor(governor_limits(cloud), journal.spent(account), self.time)
            )
            clients.append(
                self.client(
                    cloud,
                    service,
                    self.governors[-1],
                    skip_over_budget=ensemble.mode == "failover",
                )
            )
        self.client_of_all = EnsembleClient(clients, NAMES, ensemble)

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
            LocalGovernor(governor),
            transport=httpx.MockTransport(service),
            skip_unreachable=True,
            skip_over_budget=skip_over_budget,
            sleep=self.time.sleep,
            clock=self.time,
            uniform=lambda low, high: high,
        )

    def ask(self, *images: CanonicalImage, second: bool = False) -> list[Answer]:
        async def all_at_once() -> list[Answer]:
            ask = (
                self.client_of_all.second_opinion
                if second
                else self.client_of_all.answer
            )
            return list(await asyncio.gather(*(ask(image) for image in images)))

        return asyncio.run(all_at_once())

    @property
    def requests(self) -> list[int]:
        return [len(service.requests) for service in self.services]


HarnessBuilder = Callable[..., EnsembleHarness]


@pytest.fixture
def clouds(tmp_path: Path) -> HarnessBuilder:
    def build(
        *replies: Sequence[Reply],
        settings: Sequence[dict[str, Any]] = (),
        **ensemble: Any,
    ) -> EnsembleHarness:
        return EnsembleHarness(
            open_journal(str(tmp_path / "journal")),
            Ensemble(**ensemble),
            replies,
            settings,
        )

    return build


CAR = ok_response(detection_json("car", 0.8, (0, 0, 20, 20)))
BUS = ok_response(detection_json("bus", 0.6, (0, 0, 20, 20)), detection_json("dog", 0.4, (30, 0, 50, 20)))
PRICES = [{"usd_per_call": 0.01}, {"usd_per_call": 0.5}]


def test_all_are_asked_and_fused(clouds: HarnessBuilder) -> None:
    subject = clouds([CAR], [BUS], settings=PRICES, reliability=(3.0, 1.0))
    (answer,) = subject.ask(solid_image())
    assert answer.raw is not None
    assert (
        answer.status,
        answer.teachers,
        answer.calls,
        answer.attempts,
        answer.error,
    ) == ("ok", NAMES, 2, 2, None)
    assert answer.cost_usd == pytest.approx(0.51)
    assert answer.raw.class_scores == pytest.approx(
        np.array([[0.6, 0.15, 0], [0, 0, 0.1]])
    )
    assert subject.requests == [1, 1]


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_the_same_again_makes_no_call(clouds: HarnessBuilder, mode: str) -> None:
    images = [solid_image(i) for i in range(4)]
    first = clouds([CAR], [BUS], mode=mode)
    before = first.ask(*images) + (
        first.ask(images[0], second=True) if mode == "cascade" else []
    )
    again = clouds([status_response(500)], [status_response(500)], mode=mode)
    after = again.ask(*images) + (
        again.ask(images[0], second=True) if mode == "cascade" else []
    )
    assert again.requests == [0, 0]
    assert {a.status for a in after} == {"cached"}
    assert [(a.calls, a.cost_usd) for a in after] == [(0, 0)] * len(after)
    for one, other in zip(before, after, strict=True):
        assert one.raw is not None
        assert other.raw is not None
        assert same(one.raw, other.raw)
        assert one.teachers == other.teachers


def test_an_image_is_an_error_only_if_nobody_answered(clouds: HarnessBuilder) -> None:
    rejected = status_response(415, title="not an image")
    (half,) = clouds([rejected], [BUS]).ask(solid_image(1))
    assert (half.status, half.teachers, half.calls) == ("ok", ("dear",), 1)
    assert half.raw is not None
    # of one cloud that answered, as it is
    assert half.raw.class_scores.max() == pytest.approx(0.6)
    assert str(half.error).startswith("cheap: ImageRejected")
    (none,) = clouds([rejected], [rejected]).ask(solid_image(2))
    assert (none.status, none.raw, none.teachers) == ("error", None, ())
    assert "cheap: ImageRejected" in str(none.error)
    assert "dear: ImageRejected" in str(none.error)


def test_two_proved_absences(clouds: HarnessBuilder) -> None:
    nothing = httpx.Response(200, json=response_json())
    (answer,) = clouds([nothing], [nothing]).ask(solid_image())
    assert (answer.status, answer.teachers) == ("empty", NAMES)


@pytest.mark.parametrize("mode", ["fuse", "failover"])
def test_a_wrong_key_stops_the_run_and_what_was_paid_is_kept(
    clouds: HarnessBuilder, mode: str
) -> None:
    subject = clouds([status_response(401)], [BUS], mode=mode)
    with pytest.raises(AuthError):
        subject.ask(solid_image())
    assert subject.requests == [1, int(mode == "fuse")]
    assert subject.journal.contents().answers == int(mode == "fuse")


@pytest.mark.parametrize("number", [0, 1])
def test_fusing_stops_at_a_spent_budget_whoever_s_it_is(
    clouds: HarnessBuilder, number: int
) -> None:
    subject = clouds(
        [CAR],
        [BUS],
        settings=[{"max_calls": 3} if i == number else {} for i in range(2)],
    )
    with pytest.raises(BudgetExhausted, match=r"3 calls of cloud\.max_calls=3"):
        subject.ask(*[solid_image(i) for i in range(6)])
    assert subject.requests[number] == 3
    assert subject.governors[1 - number].stats().calls != 3


LIMITS = [
    ({"max_calls": 3}, "cheap: 3 calls of cloud.max_calls=3 are spent"),
    (
        {"max_usd": 0.03, "usd_per_call": 0.01},
        "cheap: 0.0300 of cloud.max_usd=0.03 USD are spent",
    ),
    ({"per_day": 3}, "cheap: cloud.per_day=3 calls were made in 24 hours"),
]


@pytest.mark.parametrize(("limit", "told"), LIMITS)
def test_failover_when_the_first_one_s_budget_is_spent(
    clouds: HarnessBuilder, limit: dict[str, Any], told: str
) -> None:
    subject = clouds([CAR], [BUS], mode="failover", settings=[limit, {}])
    answers = [subject.ask(solid_image(i))[0] for i in range(6)]
    assert [a.teachers for a in answers] == [("cheap",)] * 3 + [("dear",)] * 3
    assert [a.calls for a in answers] == [1] * 6
    assert subject.requests == [3, 3]
    assert str(answers[-1].error).startswith(told)
    assert subject.time.slept == []


def test_failover_with_many_under_way_when_the_first_one_s_budget_is_spent(
    clouds: HarnessBuilder,
) -> None:
    subject = clouds([CAR], [BUS], mode="failover", settings=[{"max_calls": 7}, {}])
    answers = subject.ask(*[solid_image(i) for i in range(20)])
    assert Counter(a.teachers for a in answers) == {("cheap",): 7, ("dear",): 13}
    assert subject.requests == [7, 13]
    assert subject.journal.spent()[0] == 20


NO_QUOTA = status_response(402, title="the quota is used up")


def test_failover_when_the_first_one_s_quota_is_spent(clouds: HarnessBuilder) -> None:
    """It is asked no more; a call of the same image that was paid before is counted."""
    subject = clouds(
        [CAR, CAR, status_response(500), NO_QUOTA, CAR], [BUS], mode="failover", settings=PRICES
    )
    answers = [subject.ask(solid_image(i))[0] for i in range(6)]
    assert [a.teachers for a in answers] == [("cheap",)] * 2 + [("dear",)] * 4
    assert subject.requests == [4, 4]
    assert [a.calls for a in answers] == [1, 1, 2, 1, 1, 1]
    assert sum(a.calls for a in answers) == subject.journal.spent()[0]
    assert sum(a.cost_usd for a in answers) == pytest.approx(subject.journal.spent()[1])
    assert "cheap: the service answered 402" in str(answers[-1].error)


def test_images_that_wait_for_a_place_do_not_ask_for_a_quota_that_is_gone(
    clouds: HarnessBuilder,
) -> None:
    subject = clouds(
        [NO_QUOTA], [BUS], mode="failover", settings=[{"in_flight": 1}, {}]
    )
    answers = subject.ask(*(solid_image(i) for i in range(6)))
    assert [a.teachers for a in answers] == [("dear",)] * 6
    assert subject.requests == [1, 6]


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
    ("one", "two", "first", "second", "kind", "text", "answered"), ALL_SPENT
)
def test_failover_ends_when_nobody_is_left(
    clouds: HarnessBuilder,
    one: list[Reply],
    two: list[Reply],
    first: dict[str, Any],
    second: dict[str, Any],
    kind: type[Exception],
    text: str,
    answered: int,
) -> None:
    subject = clouds(one, two, mode="failover", settings=[first, second])
    for i in range(answered):
        assert subject.ask(solid_image(i))[0].raw is not None
    with pytest.raises(kind, match=text):
        subject.ask(solid_image(answered))
    again = clouds([CAR], [BUS], mode="failover", settings=[{"max_calls": 3}, NONE])
    assert {a.status for a in again.ask(*[solid_image(i) for i in range(answered)])} == {
        "cached"
    }
    assert again.ask(solid_image(answered))[0].status == "ok"


def test_an_image_that_only_a_spent_cloud_could_answer_is_an_error_and_others_go_on(
    clouds: HarnessBuilder,
) -> None:
    subject = clouds(
        [status_response(415, title="not an image"), CAR],
        [BUS],
        mode="failover",
        settings=[NONE, {"max_calls": 0}],
    )
    rejected, accepted = (subject.ask(solid_image(i))[0] for i in range(2))
    assert rejected.status == "error"
    assert "cheap: ImageRejected" in str(rejected.error)
    assert "dear: 0 calls of cloud.max_calls=0" in str(rejected.error)
    assert (accepted.status, accepted.teachers) == ("ok", ("cheap",))


def test_an_open_breaker_is_waited_for_where_the_others_are_spent(
    clouds: HarnessBuilder,
) -> None:
    dear = Switched(BUS)
    subject = clouds(
        [CAR], [dear], mode="failover", settings=[{"max_calls": 1}, {"attempts": 1}]
    )
    assert subject.ask(solid_image(0))[0].teachers == ("cheap",)
    for i in range(1, WINDOW_MIN + 1):
        assert subject.ask(solid_image(i))[0].status == "error"
    dear.up = True
    assert subject.ask(solid_image(40))[0].teachers == ("dear",)
    assert sum(subject.time.slept) == pytest.approx(COOL_DOWN)


def test_a_wrong_key_stops_the_run_also_where_the_others_are_spent(
    clouds: HarnessBuilder,
) -> None:
    subject = clouds(
        [CAR], [status_response(401)], mode="failover", settings=[{"max_calls": 1}, {}]
    )
    subject.ask(solid_image(0))
    with pytest.raises(AuthError):
        subject.ask(solid_image(1))


@pytest.mark.parametrize("mode", ["fuse", "failover"])
def test_a_configuration_s_clients_hand_over_only_in_failover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        return NO_QUOTA if request.url.host == "a" else BUS

    monkeypatch.setattr(
        ensemble_module,
        "CloudClient",
        functools.partial(CloudClient, transport=httpx.MockTransport(reply)),
    )
    sizes = Cloud(url="https://a"), Cloud(url="https://b")
    config = replace(
        folder(),
        classes=CLASSES,
        cloud=sizes[0],
        more_clouds=sizes[1:],
        ensemble=Ensemble(mode),
    )  # type: ignore[arg-type]
    governors = [LocalGovernor(Governor(governor_limits(cloud))) for cloud in config.clouds]
    client = create_client(
        config, [c.url for c in sizes], open_journal(str(tmp_path)), governors
    )
    if mode == "failover":
        assert asyncio.run(client.answer(solid_image())).teachers == ("http 2",)
    else:
        with pytest.raises(QuotaExhausted):
            asyncio.run(client.answer(solid_image()))


def test_budgets_add_up_over_runs_by_account(clouds: HarnessBuilder) -> None:
    first = clouds([CAR], [BUS], settings=PRICES)
    first.ask(solid_image(0), solid_image(1))
    accounts = [client._account for client in first.client_of_all.clients]
    assert [first.journal.spent(a) for a in accounts] == [
        pytest.approx((2, 0.02)),
        pytest.approx((2, 1.0)),
    ]
    second = clouds([CAR], [BUS], settings=[{"max_calls": 3}, {"max_calls": 9}])
    second.ask(solid_image(2))
    with pytest.raises(BudgetExhausted, match=r"3 calls of cloud\.max_calls=3"):
        clouds([CAR], [BUS], settings=[{"max_calls": 3}, {"max_calls": 9}]).ask(
            solid_image(3)
        )


def test_failover_asks_the_first_while_it_answers(clouds: HarnessBuilder) -> None:
    subject = clouds([CAR], [BUS], mode="failover")
    assert {a.teachers for a in subject.ask(*[solid_image(i) for i in range(5)])} == {
        ("cheap",)
    }
    assert subject.requests == [5, 0]


class Switched:
    """Fails with 500, which may be billed, until it is ``up``."""

    def __init__(self, reply: httpx.Response) -> None:
        self.up, self.reply = False, reply

    def __call__(self, request: httpx.Request) -> httpx.Response:
        return (
            httpx.Response(200, headers=self.reply.headers, content=self.reply.content)
            if self.up
            else status_response(500)
        )


ONCE = [{"attempts": 1, "usd_per_call": 0.01}, {"attempts": 1, "usd_per_call": 0.5}]


def test_failover_when_the_breaker_opens_and_back(clouds: HarnessBuilder) -> None:
    cheap = Switched(CAR)
    subject = clouds([cheap], [BUS], mode="failover", settings=ONCE)
    over = [subject.ask(solid_image(i))[0] for i in range(30)]
    assert {(a.status, a.teachers) for a in over} == {("ok", ("dear",))}
    assert subject.requests == [WINDOW_MIN, 30]
    assert sum(a.calls for a in over) == subject.journal.spent()[0] == WINDOW_MIN + 30
    assert (
        sum(a.cost_usd for a in over)
        == pytest.approx(subject.journal.spent()[1])
        == pytest.approx(WINDOW_MIN * 0.01 + 15)
    )
    assert subject.time.slept == []  # nobody waited for the breaker
    cheap.up = True
    subject.time.now += COOL_DOWN
    assert subject.ask(solid_image(31))[0].teachers == ("cheap",)
    assert subject.governors[0].stats().breaker == "closed"


def test_an_open_breaker_is_waited_for_where_nobody_else_answers(clouds: HarnessBuilder) -> None:
    cheap = Switched(CAR)
    subject = clouds([cheap], [status_response(500)], mode="failover", settings=ONCE)
    for i in range(WINDOW_MIN):
        assert subject.ask(solid_image(i))[0].status == "error"
    cheap.up = True
    before = subject.time.now
    (answer,) = subject.ask(solid_image(40))
    assert (answer.status, answer.teachers) == ("ok", ("cheap",))
    assert subject.time.now == pytest.approx(before + COOL_DOWN)
    assert subject.requests == [WINDOW_MIN + 1, WINDOW_MIN]


def test_fusing_waits_for_an_open_breaker(clouds: HarnessBuilder) -> None:
    """A hiccup of one cloud does not change what the student learns from."""
    cheap = Switched(CAR)
    subject = clouds([cheap], [BUS], settings=ONCE)
    assert {a.teachers for i in range(WINDOW_MIN) for a in subject.ask(solid_image(i))} == {
        ("dear",)
    }
    cheap.up = True
    assert subject.ask(solid_image(40))[0].teachers == NAMES


def test_failover_takes_an_answer_on_record_whoever_gave_it(clouds: HarnessBuilder) -> None:
    clouds([status_response(415)], [BUS], mode="failover").ask(solid_image())
    subject = clouds([CAR], [status_response(500)], mode="failover")
    (answer,) = subject.ask(solid_image())
    assert (answer.status, answer.teachers) == ("cached", ("dear",))
    assert subject.requests == [0, 0]


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_nobody_can_be_reached(clouds: HarnessBuilder, mode: str) -> None:
    gone = [httpx.ConnectError("refused")]
    subject = clouds(gone, gone, mode=mode)
    with pytest.raises(CloudUnreachable, match="cheap: CloudUnreachable"):
        subject.ask(*[solid_image(i) for i in range(40)])


def test_fusing_goes_on_without_a_cloud_that_can_t_be_reached(clouds: HarnessBuilder) -> None:
    subject = clouds(
        [CAR], [httpx.ConnectError("refused")], settings=[{}, {"attempts": 2}]
    )
    answers = subject.ask(*[solid_image(i) for i in range(8)])
    assert {a.teachers for a in answers} == {("cheap",)}
    assert {a.status for a in answers} == {"ok"}
    assert "dear: CloudUnreachable" in str(answers[0].error)
    assert subject.journal.spent()[0] == 8


def test_a_cascade_asks_the_dear_one_only_for_a_second_opinion(clouds: HarnessBuilder) -> None:
    subject = clouds([CAR], [BUS], mode="cascade", settings=PRICES)
    images = [solid_image(i) for i in range(4)]
    first = subject.ask(*images)
    assert subject.requests == [4, 0]
    assert {a.teachers for a in first} == {("cheap",)}
    (second,) = subject.ask(images[2], second=True)
    assert subject.requests == [4, 1]
    assert (second.status, second.teachers, second.calls, second.cost_usd) == (
        "ok",
        NAMES,
        1,
        0.5,
    )
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


@pytest.mark.parametrize(("mode", "one", "two", "kind"), CHECKS)
def test_check(
    clouds: HarnessBuilder,
    mode: str,
    one: list[Reply],
    two: list[Reply],
    kind: type[Exception] | None,
) -> None:
    subject = clouds(one, two, mode=mode)
    if kind is None:
        asyncio.run(subject.client_of_all.check())
    else:
        with pytest.raises(kind):
            asyncio.run(subject.client_of_all.check())


def test_two_services_of_different_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service of tasks that downsizes and one with names of its own, over the
    emulator; both see the same scene."""
    for name in ("DDS_API_TOKEN", "GOOGLE_VISION_API_KEY"):
        monkeypatch.setenv(name, emulated.TOKEN)
    labels = tmp_path / "map.yaml"
    labels.write_text("service: google-vision\nmap: {Car: car, Bus: bus, Dog: dog}\n")
    server = Emulator(PROVIDERS)
    config = replace(
        folder(),
        classes=CLASSES,
        cloud=Cloud(service="dino-x", url=server.url("dds")),
        more_clouds=(
            Cloud(
                service="google-vision",
                url=server.url("google-vision"),
                label_map=str(labels),
            ),
        ),
    )
    boxes = [(40, 60, 1200, 900), (1500, 200, 1900, 700)]
    data = scene([0, 2], boxes, (2000, 1000))

    async def ask() -> Answer:
        journal = open_journal(str(tmp_path / "journal"))
        clients = [
            CloudClient(
                cloud,
                CLASSES,
                cloud.url,
                journal,
                LocalGovernor(Governor(governor_limits(cloud))),
                transport=server.transport(),
            )
            for cloud in config.clouds
        ]
        client = EnsembleClient(clients, cloud_names(config.clouds), config.ensemble)
        images = render_for_clouds(client, data)
        assert [image.width for image in images] == [1536, 2000]
        return await client.answer(*images)

    answer = asyncio.run(ask())
    assert (answer.status, answer.teachers, answer.calls) == (
        "ok",
        ("dino-x", "google-vision"),
        2,
    )
    assert answer.raw is not None
    assert answer.raw.boxes == pytest.approx(np.array(boxes, np.float32), abs=1.5)
    assert answer.raw.class_scores.argmax(1).tolist() == [0, 2]
    assert answer.raw.class_scores[0, 0] == pytest.approx(0.99)


def test_an_image_is_made_for_each_cloud_as_for_it_alone(tmp_path: Path) -> None:
    data = scene([0], [(40, 60, 1200, 900)], (2000, 1000), "JPEG")
    sizes = (
        Cloud(url="https://a", max_side=512),
        Cloud(url="https://b"),
        Cloud(url="https://c", max_side=512),
    )
    config = replace(folder(), classes=CLASSES, cloud=sizes[0], more_clouds=sizes[1:])
    governors = [LocalGovernor(Governor(governor_limits(cloud))) for cloud in config.clouds]
    client = create_client(
        config, [c.url for c in sizes], open_journal(str(tmp_path)), governors
    )
    images = render_for_clouds(client, data)
    assert [image.data for image in images] == [
        canonical_image(data, side).data for side in (512, 4096, 512)
    ]
    alone = create_client(
        replace(config, more_clouds=()),
        ["https://a"],
        open_journal(str(tmp_path)),
        governors,
    )
    assert isinstance(alone, CloudClient)
    assert render_for_clouds(alone, data) == [canonical_image(data, 512)]


def test_more_clouds_cost_little_time() -> None:
    """Some hundred boxes of three clouds are fused well below the time of a call."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 500, (3, 300, 2))
    said = [
        RawDetections(
            np.concatenate([c, c + 40], 1).astype(np.float32),
            generator.uniform(0, 1, (300, 5)).astype(np.float32),
            "label",
        )
        for c in corners
    ]
    for order in itertools.permutations(range(3)):
        fused = fuse_answers([said[i] for i in order], [1, 1, 1], 0.55)
    assert 300 <= len(fused) <= 900
