"""``coin-ray serve``: a detection API on this machine; ``coin-ray serve register EXPORT``:
make an export the champion of MLflow's registry.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

REGISTER = """\
Register an export in MLflow and make it the champion, which servers follow.

    coin-ray serve register runs/demo/export --name coin-student --registry sqlite:///runs/demo/mlflow.db
"""


def serve(arguments: Sequence[str]) -> None:
    """Serve a detector until the process is told to stop, or register an export."""
    if arguments[:1] == ["register"]:
        register_champion(arguments[1:])
        return
    from coin_ray.serving.local_cloud import main

    main(arguments)


def register_champion(arguments: Sequence[str]) -> None:
    """Register an export, give it the alias, and print its version."""
    options = build_register_parser().parse_args(arguments)
    from coin_ray.serving.champion import register

    version = register(options.folder, options.name, options.registry, options.alias)
    print(f"{options.name} version {version} is the {options.alias}")


def build_register_parser() -> argparse.ArgumentParser:
    """Return the parser of ``serve register``."""
    parser = argparse.ArgumentParser(
        prog="coin-ray serve register",
        description=REGISTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", help="folder written by coin-ray export, as ROOT/export"
    )
    parser.add_argument("--name", default="coin-student", help="the registered model")
    parser.add_argument(
        "--registry",
        default="",
        help="MLflow's tracking URI (default: MLFLOW_TRACKING_URI)",
    )
    parser.add_argument(
        "--alias", default="champion", help="alias that moves to it (default: champion)"
    )
    return parser
