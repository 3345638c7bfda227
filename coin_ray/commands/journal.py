"""``coin-ray journal show|verify|compact``: what a run has been answered and has spent.
Nothing here makes a call.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.errors import InputError

if TYPE_CHECKING:
    from coin_ray.cloud.journal.base import AnswerRecord, Journal
    from coin_ray.config import PipelineConfig

DESCRIPTION = """\
Show, verify or compact the journal of the cloud's answers, or drop one of them. Makes
no call.

    coin-ray journal show|verify|compact --root ROOT
    coin-ray journal drop --root ROOT IMAGE_OR_KEY_OR_JOB
"""


def journal(arguments: Sequence[str]) -> int:
    """Run one of the tools; return 1 if ``verify`` finds damage."""
    options = build_journal_parser().parse_args(arguments)
    tool: Callable[[argparse.Namespace], int] = options.tool
    return tool(options)


def build_journal_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="coin-ray journal",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = parser.add_subparsers(required=True, metavar="show|verify|compact|drop")
    for name, tool, description in (
        ("show", show_journal, "answers, calls, USD and bytes"),
        (
            "verify",
            verify_journal,
            "read every record again; exit code 1 if any is damaged",
        ),
        (
            "compact",
            compact_journal,
            "rewrite live answers and sums into one file; no run may be using the"
            " journal",
        ),
        (
            "drop",
            drop_answer,
            "drop one answer: the next run asks, and pays, for it again",
        ),
    ):
        tool_parser = tools.add_parser(name, help=description)
        tool_parser.add_argument("--root", required=True, help="folder or URI of a run")
        tool_parser.set_defaults(tool=tool)
        if name == "drop":
            tool_parser.add_argument(
                "answer",
                metavar="IMAGE_OR_KEY_OR_JOB",
                help=(
                    "the image's path, file name or image_id, the answer's key in the"
                    " journal, or the id of a job of --cloud.batch that is gone"
                ),
            )
    return parser


def open_run_journal(root: str) -> Journal:
    """Open the journal of the run at ``root``. Raise InputError if it has none."""
    from coin_ray.cloud.journal.opening import open_journal

    uri = storage.join(storage.absolute_uri(root), "journal")
    if not storage.exists(uri):
        raise InputError(
            f"no journal at {uri}; --root must be the folder of a run that queried a"
            " service"
        )
    return open_journal(uri)


def show_journal(options: argparse.Namespace) -> int:
    """Print what the journal holds and what was spent."""
    journal = open_run_journal(options.root)
    contents = journal.contents()
    print(f"answers      {contents.answers:>9,}")
    for (service, model), count in sorted(contents.services.items()):
        service_name = f"{service or 'service not recorded'} {model}".rstrip()
        print(f"  {count:>18,}  {service_name}")
    print(f"open tasks   {contents.tasks:>9,}")
    print(f"quarantined  {contents.quarantined:>9,}")
    print(f"attempts     {contents.attempts:>9,}")
    print(f"refunds      {contents.refunds:>9,}")
    print(f"spent        {contents.calls:>9,} calls, ${contents.usd:,.4f}")
    print(f"maybe billed {contents.unanswered:>9,} of these: no answer on record")
    print(f"size         {contents.size:>9,} bytes")
    return 0


def verify_journal(options: argparse.Namespace) -> int:
    """Print every damaged place; return 1 if there is one."""
    journal = open_run_journal(options.root)
    damage_count = 0
    for damage in journal.verify():
        damage_count += 1
        print(f"{damage.path}: offset {damage.offset}: {damage.reason}")
    if damage_count:
        print(f"{damage_count} damaged places")
        return 1
    print(f"no damage; {len(journal.keys()):,} answers and tasks can be read")
    return 0


def compact_journal(options: argparse.Namespace) -> int:
    """Rewrite the journal as one file and print its size before and after."""
    from coin_ray.cloud.journal.segments import SegmentJournal

    journal = open_run_journal(options.root)
    if not isinstance(journal, SegmentJournal):
        print("nothing to do: on an object store each answer is an object of its own")
        return 0
    before, after = journal.compact()
    print(f"{before:,} bytes before, {after:,} after")
    return 0


def drop_answer(options: argparse.Namespace) -> int:
    """Drop one answer and print what it was worth. Raise InputError if the name stands
    for no answer, or for several.
    """
    from coin_ray.cloud.journal.keys import TASK
    from coin_ray.runs.lease import hold_root
    from coin_ray.stages.collecting.dropped_answers import ask_again

    root = storage.absolute_uri(options.root)
    with hold_root(root):
        journal = open_run_journal(root)
        job_size = drop_job(journal, options.answer)
        if job_size:
            journal.close()
            print(
                f"dropped the job {options.answer}: the next run asks about its"
                f" {job_size} images again; what they cost stays spent"
            )
            return 0
        key, image = find_answer(root, options.answer, journal)
        record = journal.get(key)
        assert record is not None
        collections = ask_again(root, image["image_id"]) if image else 0
        journal.drop(key)
        if journal.get(key + TASK) is not None:
            journal.drop(key + TASK)
        journal.close()
    print(f"dropped {key}: {_describe_answer(record)}")
    if image is None:
        print("no image of this root, with its present settings, has this key")
    elif collections:
        print(f"the same command asks about {image['uri']} again")
    else:
        print(f"{image['uri']} is asked about when a run collects it")
    return 0


def drop_job(journal: Journal, job: str) -> int:
    """Drop the records of the images in a job of a batch endpoint; return how many."""
    from coin_ray.cloud.journal.keys import BATCH

    keys = []
    for key in journal.keys():  # noqa: SIM118
        record = journal.get(key) if key.endswith(BATCH) else None
        if record is not None and json.loads(record.body).get("job") == job:
            keys.append(key)
    if not job:
        return 0
    journal.drop_all(keys)
    return len(keys)


def _describe_answer(record: AnswerRecord) -> str:
    """Return whose the answer is, when it came and what it cost."""
    service = f"{record.service or 'service not recorded'} {record.model}".rstrip()
    moment = datetime.fromtimestamp(record.time, UTC).strftime("%Y-%m-%d %H:%M")
    return (
        f"{service}, {moment} UTC, ${record.cost_usd:,.4f}, {record.attempts} attempts,"
        f" {len(record.body):,} bytes"
    )


def find_answer(
    root: str, name: str, journal: Journal
) -> tuple[str, dict[str, Any] | None]:
    """Return the key of the one answer that ``name`` stands for, and the row of its
    image (``image_id``, ``uri``); None if no image has the key.

    Raises InputError if there is no such answer, or several.
    """
    from coin_ray.runs.estimate import recorded_keys
    from coin_ray.runs.graph import build_steps
    from coin_ray.runs.steps import with_found_range

    config = read_run_config(root)
    if config is not None:
        config = with_found_range(config, build_steps(config)["images"].folder(root))
    images = _read_run_images(root)
    if journal.get(name) is not None:
        if config is not None:
            for image in images:
                image_id, uri = image["image_id"], image["uri"]
                if name in recorded_keys(config, image_id, uri, journal):
                    return name, image
        return name, None
    named = _find_images(images, name)
    if not named:
        raise InputError(
            f"{name!r} is neither a key of the journal below {root} nor the path, file"
            " name or image_id of one of its images"
        )
    if len(named) > 1:
        uris = ", ".join(image["uri"] for image in named)
        raise InputError(f"{name!r} stands for several images, give one: {uris}")
    (image,) = named
    if config is None:
        raise InputError(
            f"{root} has no config.yaml, which tells the key of an image's answer: give"
            " the key"
        )
    keys = recorded_keys(config, image["image_id"], image["uri"], journal)
    if not keys:
        raise InputError(
            f"no answer about {image['uri']} is on record for the settings in"
            f" {root}/config.yaml"
        )
    if len(keys) > 1:
        answers = "\n".join(f"  {key}  {_describe_key(key, journal)}" for key in keys)
        raise InputError(
            f"{len(keys)} answers about {image['uri']} are on record; give the key of"
            f" one:\n{answers}"
        )
    return keys[0], image


def _describe_key(key: str, journal: Journal) -> str:
    record = journal.get(key)
    return _describe_answer(record) if record is not None else ""


def read_run_config(root: str) -> PipelineConfig | None:
    """Read the settings of the last run below the root; None if there are none."""
    from coin_ray.config.yaml_files import read_config

    uri = storage.join(storage.absolute_uri(root), "config.yaml")
    return read_config(uri) if storage.exists(uri) else None


def _read_run_images(root: str) -> list[dict[str, Any]]:
    """Return ``image_id`` and ``uri`` of all images that runs below the root listed."""
    images: dict[str, dict[str, Any]] = {}
    for folder in storage.list_folders(storage.join(root, "steps")):
        uri = storage.join(folder, "images.parquet")
        if folder.rpartition("/")[2].startswith("images-") and storage.exists(uri):
            for row in storage.read_table(uri).select(["image_id", "uri"]).to_pylist():
                images[row["uri"]] = row
    return list(images.values())


def _find_images(images: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the images that ``name`` is the path, file name or image_id of; of equal
    files one.
    """
    uri = storage.absolute_uri(name)
    named = [image for image in images if image["uri"] in (name, uri)] or [
        image
        for image in images
        if name in (image["image_id"], image["uri"].rpartition("/")[2])
    ]
    return list({image["image_id"]: image for image in named}.values())
