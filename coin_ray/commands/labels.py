"""``coin-ray labels check|propose|export``: label maps, and the labels of a finished
run. Nothing here makes a call.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coin_ray import storage
from coin_ray.commands.arguments import parse_names
from coin_ray.commands.journal import open_run_journal, read_run_config
from coin_ray.errors import ConfigError, InputError

if TYPE_CHECKING:
    from coin_ray.cloud.label_map import LabelMap
    from coin_ray.cloud.label_proposal import Embed
    from coin_ray.cloud.observed_names import ObservedNames
    from coin_ray.config import PipelineConfig

DESCRIPTION = """\
Check or propose a label map: from a service's own names to the classes. Export the
labels of a finished run as a data set. Makes no call.

    coin-ray labels check FILE --classes a,b [--root ROOT]
    coin-ray labels propose --classes a,b --root ROOT [--out FILE]
    coin-ray labels export --root ROOT --of fused --format coco --out DIR
"""
PRINTED_NAMES = 40
DEFAULT_MARGIN = 0.05
LABEL_SOURCES = ("fused", "student", "cloud", "consistent")
LABEL_FORMATS = ("coco", "yolo", "voc")


def labels(arguments: Sequence[str]) -> int:
    """Run one of the tools; return 1 if ``check`` finds something to mend."""
    options = build_labels_parser().parse_args(arguments)
    tool: Callable[[argparse.Namespace], int] = options.tool
    return tool(options)


def build_labels_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="coin-ray labels",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = parser.add_subparsers(required=True, metavar="check|propose|export")
    check = tools.add_parser(
        "check",
        help=(
            "is every class reachable, and which names of the journal's answers does"
            " the map not know?"
        ),
    )
    check.add_argument("file")
    check.add_argument("--classes", required=True, type=_parse_classes, help="a,b")
    check.add_argument(
        "--root", help="folder or URI of a run, for the names its service gave"
    )
    check.set_defaults(tool=check_label_map)
    propose = tools.add_parser(
        "propose",
        help="write a map to correct by hand, from the names in the journal's answers",
    )
    propose.add_argument("--classes", required=True, type=_parse_classes, help="a,b")
    propose.add_argument("--root", required=True, help="folder or URI of a run")
    propose.add_argument(
        "--out", help="file to write; it must not exist (default: print)"
    )
    propose.add_argument(
        "--service", help="the service that gave the names (default: the run's)"
    )
    propose.add_argument(
        "--no-similarity",
        action="store_true",
        help="don't guess by CLIP's text similarity",
    )
    propose.add_argument(
        "--clip-model", help="open_clip model for guesses (default: the run's)"
    )
    propose.add_argument("--clip-pretrained", help="its weights: a tag or a file")
    propose.add_argument(
        "--margin",
        type=float,
        default=DEFAULT_MARGIN,
        help=(
            f"how much nearer a guess must be than the next class ({DEFAULT_MARGIN})"
        ),
    )
    propose.set_defaults(tool=propose_map)
    _add_export(tools)
    return parser


def _add_export(tools: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = tools.add_parser(
        "export", help="write the labels of a finished run as a data set"
    )
    export.add_argument("--root", required=True, help="folder or URI of a finished run")
    export.add_argument(
        "--of",
        choices=LABEL_SOURCES,
        default=LABEL_SOURCES[0],
        help=(
            "the cloud's boxes; only those consistent with CLIP's; the student's; or"
            " cloud, CLIP and student fused (default)"
        ),
    )
    export.add_argument("--format", required=True, choices=LABEL_FORMATS)
    export.add_argument(
        "--out", required=True, metavar="DIR", help="a new or empty local folder"
    )
    export.add_argument(
        "--score-min",
        type=_parse_score_min,
        default=None,
        metavar="auto|X",
        help=(
            "lowest score of an object; auto (default): by class, with the best F1 on"
            " labelled validation images, else one number for all"
        ),
    )
    export.add_argument(
        "--val",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the images for the split val, by a hash of their ids (0.1)",
    )
    export.add_argument(
        "--copy-images", action="store_true", help="copy images instead of linking"
    )
    export.set_defaults(tool=export_run_labels)


def _parse_score_min(text: str) -> float | None:
    return None if text == "auto" else float(text)


def _parse_classes(text: str) -> list[str]:
    names = parse_names(text)
    if not names or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(
            "give different class names, separated by commas"
        )
    return names


def check_label_map(options: argparse.Namespace) -> int:
    """Print the names of each class; return 1 if a class has none, or if the journal
    holds names that the map does not know.
    """
    from coin_ray.cloud.label_map import load_label_map
    from coin_ray.cloud.observed_names import count_observed_names

    label_map = load_label_map(options.file, options.classes)
    has_unreachable_class = False
    for column, class_name in enumerate(options.classes):
        names = ", ".join(
            name if weight == 1 else f"{name} (weight {weight:g})"
            for name, (named_column, weight) in label_map.names.items()
            if named_column == column
        )
        has_unreachable_class |= not names
        print(f"{class_name}: {names or 'NOT REACHABLE: no name means it'}")
    unknown_names = 0
    if options.root:
        observed = count_observed_names(open_run_journal(options.root))
        unknown_names = _print_unknown_names(label_map, observed)
    return 1 if has_unreachable_class or unknown_names else 0


def _print_unknown_names(label_map: LabelMap, observed: ObservedNames) -> int:
    """Print names that would be dropped and counted, most frequent first; return how
    many there are.
    """
    unknown = Counter(
        {
            name: count
            for name, count in observed.names.items()
            if label_map.find(name.candidates) is None
            and not label_map.ignores(name.candidates)
        }
    )
    print(
        f"\n{observed.answers:,} answers in the journal, {observed.names.total():,}"
        f" boxes, {unknown.total():,} of them under a name not in the map"
    )
    if observed.unreadable:
        print(f"{observed.unreadable:,} answers are no JSON")
    for name, count in unknown.most_common(PRINTED_NAMES):
        print(f"  {count:>9,}  {name}")
    if len(unknown) > PRINTED_NAMES:
        print(f"  and {len(unknown) - PRINTED_NAMES:,} more names")
    return len(unknown)


def propose_map(options: argparse.Namespace) -> int:
    """Write or print a label map proposed from the journal's answers."""
    from coin_ray.cloud.label_proposal import propose_label_map
    from coin_ray.cloud.observed_names import count_observed_names

    if options.out and storage.exists(storage.absolute_uri(options.out)):
        raise ConfigError(
            f"{options.out} exists and is not overwritten; give --out another name"
        )
    observed = count_observed_names(open_run_journal(options.root))
    config = read_run_config(options.root)
    service = options.service or (config.cloud.service if config else "http")
    embed = None if options.no_similarity else _load_text_encoder(options, config)
    text = propose_label_map(observed, options.classes, service, embed, options.margin)
    if options.out:
        storage.write_bytes(storage.absolute_uri(options.out), text.encode())
        print(
            f"wrote {options.out}: read it, correct it, and give it as"
            " --cloud.label-map"
        )
    else:
        print(text, end="")
    return 0


def export_run_labels(options: argparse.Namespace) -> int:
    """Write the labels of a finished run and print what was written."""
    from coin_ray.experiments.label_export import (
        ExportSettings,
        describe_counts,
        export_labels,
    )

    root = storage.absolute_uri(options.root)
    config = read_run_config(root)
    if config is None:
        raise InputError(f"{root} has no config.yaml: --root must be a run's folder")
    settings = ExportSettings(
        options.of,
        options.format,
        options.out,
        options.score_min,
        options.val,
        options.copy_images,
    )
    counts = export_labels(root, config, settings)
    print(f"{options.out}: {describe_counts(counts)}")
    return 0


def _load_text_encoder(
    options: argparse.Namespace, config: PipelineConfig | None
) -> Embed | None:
    """Return CLIP's text encoder, or None, with a note, if the model can't be loaded."""
    from coin_ray.clip.encoder import class_embeddings, load_clip
    from coin_ray.config import Clip

    run_clip = config.clip if config else Clip()
    clip = Clip(
        options.clip_model or run_clip.model,
        options.clip_pretrained or run_clip.pretrained,
        templates=("a photo of a {}.",),
    )
    try:
        model = load_clip(clip)
    except InputError as error:
        print(f"no guesses by text similarity: {error}", file=sys.stderr)
        return None
    return lambda names: class_embeddings(model, names, clip)[:-1].numpy()
