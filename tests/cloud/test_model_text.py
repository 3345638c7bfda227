"""Whole answers of language models are read in any wrapping, others never."""

from __future__ import annotations

import contextlib
import json

import pytest
from operations import count_calls

from coin_ray.cloud.adapters.openai_vlm import OpenAiVlmAdapter
from coin_ray.cloud.adapters.prompts import XYXY_1000, YXYX_1000
from coin_ray.cloud.protocol import BoxCounts, Query, RawDetections
from coin_ray.errors import CloudError, ProtocolError, Refused, UnusableBoxes

from .cases import CLASSES
from .emulator.openai_vlm import completion
from .test_adapters import FRAME

QUERY = Query("default", CLASSES, 0.05)
CAR = '{"bbox_2d": [100, 250, 500, 750], "label": "car"}'
DOG = '{"bbox_2d": [20, 30, 400, 200], "label": "dog"}'
LIST = f"[{CAR}, {DOG}]"
CAR_BOX, DOG_BOX = [60, 100, 300, 300], [12, 12, 240, 80]

WRAPPINGS = {
    "bare": LIST,
    "a fence": f"```json\n{LIST}\n```",
    "a fence in capitals": f"``` JSON\n{LIST}\n```",
    "a lone closing fence": f"{LIST}\n```\n",
    "words before": f"Here they are: {LIST}",
    "words after": f"{LIST}\nTell me if you want more.",
    "words around a fence": f"I see [two] objects:\n```json\n{LIST}\n```\nDone.",
    "coordinates in words": f"From [100, 250] to [x2, y2], in 0..1000:\n{LIST}",
    "JSON lines": f"{CAR}\n{DOG}",
    "JSON lines with commas": f"{CAR},\n{DOG}",
    "JSON lines in a fence": f"```jsonl\n{CAR}\n{DOG}\n```",
    "a list for each class": f"[{CAR}]\n[{DOG}]",
    "the same list twice": f"{LIST}\n\nThe final answer:\n{LIST}",
    "thoughts": f"<think>\nA car [left] of a dog?\n</think>\n\n{LIST}",
    "thoughts with a draft": f"<think>[{CAR}], or []?</think>{LIST}",
    "only the end of thoughts": f"so they are two\n</think>\n{LIST}",
    "thoughts of another maker": f"<seed:think>hm</seed:think>{LIST}",
    "thoughts in brackets": f"[THINK]hm []?[/THINK]{LIST}",
    "channels": (
        "<|channel|>analysis<|message|>hm []<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{LIST}<|return|>"
    ),
    "special tokens": f"<|begin_of_box|>{LIST}<|end_of_box|>",
    "an answer element": f"<answer>{LIST}</answer>",
    "a list in an object": f'{{"detections": {LIST}}}',
    "a list in two objects": f'{{"result": {{"count": 2, "objects": {LIST}}}}}',
    "an object in a list": f'[{{"detections": {LIST}}}]',
    "a list in a list": f"[{LIST}]",
    "bbox": LIST.replace("bbox_2d", "bbox"),
    "box_2d": LIST.replace("bbox_2d", "box_2d"),
    "box": LIST.replace("bbox_2d", "box"),
    "a list of boxes": LIST.replace("[100, 250, 500, 750]", "[[100, 250, 500, 750]]"),
    "class": LIST.replace("label", "class"),
    "description": LIST.replace("label", "description"),
}


def _parse(text: str) -> RawDetections:
    return XYXY_1000.parse_detections(text, QUERY, FRAME)


@pytest.mark.parametrize("text", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_whole_answers_are_read_in_any_wrapping(text: str) -> None:
    raw = _parse(text)
    assert raw.boxes.round().tolist() == [CAR_BOX, DOG_BOX]
    assert raw.class_scores.argmax(1).tolist() == [0, 2]


# a list of lines or of words ends wherever it ends: finish_reason tells
ENDS_ANYWHERE = {"JSON lines", "JSON lines with commas", "a list for each class"}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_an_answer_cut_off_at_any_character_is_never_fewer_boxes(name: str) -> None:
    text = WRAPPINGS[name]
    whole = _parse(text).boxes.tolist()
    believed = []
    for length in range(len(text)):
        try:
            boxes = _parse(text[:length]).boxes.tolist()
        except ProtocolError:
            continue
        assert boxes
        if boxes != whole:
            believed.append(text[:length])
    if name in ENDS_ANYWHERE:
        assert {cut.rstrip() for cut in believed} <= {CAR, f"[{CAR}]"}
    else:
        assert not believed


@pytest.mark.parametrize("text", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_an_answer_cut_off_at_any_byte_is_an_error(text: str) -> None:
    body = json.dumps(completion(text)).encode()
    adapter = OpenAiVlmAdapter("xyxy_1000")
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            adapter.decode({}, body[:length], QUERY, FRAME)
    for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length", None, "?"):
        body = json.dumps(completion(text) | {"choices": [_choice(text, reason)]})
        with pytest.raises(ProtocolError, match="finish_reason"):
            adapter.decode({}, body.encode(), QUERY, FRAME)


def _choice(text: str, reason: str | None, **fields: object) -> dict[str, object]:
    message = {"role": "assistant", "content": text}
    return {"message": message, "finish_reason": reason, **fields}


NO_OBJECTS = [
    "[]",
    " [ ] ",
    "```json\n[]\n```",
    "[]\n```",
    "<think>no car, no dog</think>[]",
    "<|begin_of_box|>[]<|end_of_box|>",
    "There are no cars in this image.\n\n```json\n[]\n```",
    "There are no cars in this image.\n\n[]",
    "[]\n\nThere are no cars in this image.",
    '{"detections": []}',
    '{"objects": [], "count": 0}',
]


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_no_objects_where_the_model_says_so(text: str) -> None:
    assert len(_parse(text)) == 0


UNCERTAIN = [
    "",
    "None.",
    "{}",
    "[[]]",
    "null",
    "[] []",
    "[] I found none.",
    "I answer [] if there is none",
    "The image is too blurry, I could not find any.\n\n[]",
    "The objects are unclear.\n```json\n[]\n```",
    '{"error": "no image", "objects": []}',
    '{"thoughts": []}',
    '{"cars": [], "dogs": []}',
    f"[]\n{LIST}",
    f"{LIST}\n[]",
    "<think>[]",
    "<think>a car? []",
    f"{LIST}<think>or",
    f"<|begin_of_box|>{LIST}",
    f"<answer>{LIST}",
    f"```json\n{LIST}",
    f"First: [{CAR}] and then: [{DOG}]",
    f"{CAR},",
    f"{CAR}]",
    f"[{CAR}, ",
    f"[{CAR}, {DOG[:-3]}",
    "[" * 100_000,
    '[{"a":' * 50_000,
    "[100, 250, 500, 750]",
    f'[{CAR}, "car"]',
    f"[{CAR}, []]",
    '[{"bbox": [1, 2, 300, 400], "box": [5, 6, 70, 80], "label": "car"}]',
]


@pytest.mark.parametrize("text", UNCERTAIN, ids=lambda text: repr(text[:40]))
def test_what_is_not_certainly_a_list_is_an_error(text: str) -> None:
    with pytest.raises(ProtocolError):
        _parse(text)


def test_a_refusal_after_thoughts() -> None:
    with pytest.raises(Refused):
        _parse("<think>people!</think>I'm sorry, I can't help with that.")


FINISHED = ["stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "COMPLETE"]


@pytest.mark.parametrize("reason", FINISHED)
def test_answers_that_a_model_ended_by_itself(reason: str) -> None:
    body = json.dumps(completion(LIST, reason)).encode()
    raw = OpenAiVlmAdapter("xyxy_1000").decode({}, body, QUERY, FRAME)
    assert len(raw) == 2


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"native_finish_reason": "MAX_TOKENS"}, ProtocolError),
        ({"stop_reason": "max_tokens"}, ProtocolError),
        ({"native_finish_reason": "SAFETY"}, Refused),
        ({"native_finish_reason": "completed", "stop_reason": 151645}, None),
    ],
)
def test_the_reason_of_the_server_behind_a_gateway(
    fields: dict[str, object], kind: type[CloudError] | None
) -> None:
    body = json.dumps({"choices": [_choice(LIST, "stop", **fields)]}).encode()
    adapter = OpenAiVlmAdapter("xyxy_1000")
    if kind is None:
        assert len(adapter.decode({}, body, QUERY, FRAME)) == 2
        return
    with pytest.raises(kind):
        adapter.decode({}, body, QUERY, FRAME)


def test_content_in_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "[]"}]},
        {"type": "text", "text": LIST[:20]},
        {"type": "text", "text": LIST[20:]},
    ]
    body = json.dumps(completion(parts)).encode()
    raw = OpenAiVlmAdapter("xyxy_1000").decode({}, body, QUERY, FRAME)
    assert raw.boxes.round().tolist() == [CAR_BOX, DOG_BOX]
    refusal = json.dumps(completion([{"type": "refusal", "refusal": "no"}])).encode()
    with pytest.raises(Refused):
        OpenAiVlmAdapter("xyxy_1000").decode({}, refusal, QUERY, FRAME)


def test_corners_the_other_way_round_are_put_right() -> None:
    text = '[{"box_2d": [400, 300, 100, 200], "label": "car"}]'
    raw = YXYX_1000.parse_detections(text, QUERY, FRAME)
    assert raw.boxes.round().tolist() == [[120, 40, 180, 160]]
    assert raw.counts == BoxCounts(swapped=1)


def test_boxes_of_other_names_alone_are_an_error_that_names_them() -> None:
    text = '[{"bbox_2d": [100, 250, 500, 750], "label": "voiture"}]'
    with pytest.raises(UnusableBoxes, match=r"'voiture'.*label_map"):
        _parse(text)
    raw = _parse(text[:-1] + f", {DOG}]")
    assert raw.unmapped == ("voiture",)
    assert raw.counts == BoxCounts(unmapped=1)


@pytest.mark.parametrize(
    ("repeated", "end"),
    [
        ("[1, ", ""),
        ("\n" * 100, "[]x"),
        ("[ ", ""),
        ("<|channel|>final", ""),
        ("```", LIST),
    ],
    ids=["cut off", "empty lines", "brackets", "marks", "fences"],
)
def test_the_work_grows_with_the_text_at_most(repeated: str, end: str) -> None:
    def parse(repetitions: int) -> None:
        with contextlib.suppress(ProtocolError):
            _parse(repeated * repetitions + end)

    shorter, longer = (count_calls(lambda n=n: parse(n)) for n in (10_000, 40_000))
    assert longer < 4.5 * shorter
