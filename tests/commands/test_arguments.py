from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coin_ray.commands import arguments as cli
from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.commands.main import main
from coin_ray.config import Ensemble, Folder
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError

FULL = Path(__file__).parents[2] / "pipelines" / "full.py"
IMAGES = ("--images", "pictures")
CLOUD = ("--cloud", "https://detector.example.com")
MINIMAL = ("folder", *IMAGES, "--classes", "person,dog", *CLOUD)


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        parse_run_arguments(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_first_run() -> None:
    config, options = parse_run_arguments(MINIMAL)
    assert isinstance(config.data, Folder)
    assert (config.data.images, config.classes, config.cloud.url) == (
        "pictures",
        ("person", "dog"),
        "https://detector.example.com",
    )
    assert options.root == str(Path("runs/folder").absolute())
    assert (options.until, options.dry_run, options.baselines) == (None, False, False)


@pytest.mark.parametrize("equals", [True, False])
def test_a_file_of_classes(tmp_path: Path, equals: bool) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("person: {ask: [man, woman], score_min: 0.3}\ndog: {not: [wolf]}\n")
    option = (f"--classes={file}",) if equals else ("--classes", str(file))
    config, _ = parse_run_arguments(("folder", *IMAGES, *option, *CLOUD, "--seed", "3"))
    assert config.classes == ("person", "dog")
    assert config.class_phrases == (("man", "woman"), ("dog",))
    assert config.class_prompts[1].negatives == ("wolf",)
    assert (config.labels.class_score_min, config.seed) == ((0.3, None), 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--classes", "person,dog"), ("person", "dog")),
        (("--classes=person,dog",), ("person", "dog")),
        (("--classes", "person", "dog"), ("person", "dog")),
        (("--classes", "traffic light, stop sign"), ("traffic light", "stop sign")),
        (("--classes", " person ,, dog,"), ("person", "dog")),
        (("--classes", "dog"), ("dog",)),
    ],
)
def test_classes(arguments: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert (
        parse_run_arguments(("folder", *IMAGES, *CLOUD, *arguments))[0].classes
        == expected
    )
    assert (
        parse_run_arguments(("folder", *arguments, *IMAGES, *CLOUD))[0].classes
        == expected
    )


def test_a_co_detr_student_comes_with_its_training_and_can_be_changed_further() -> None:
    config, _ = parse_run_arguments(
        (
            "demo",
            "--student",
            "co-detr",
            "--distill.fit.steps",
            "50",
            "--distill.co-detr.width",
            "32",
        )
    )
    assert (
        config.distill.student,
        config.distill.fit.steps,
        config.distill.co_detr.width,
    ) == ("co-detr", 50, 32)
    assert config.distill.co_detr.queries < 100
    with pytest.raises(ConfigError, match=r"yolox-nano.*got .yolo.$"):
        parse_run_arguments(("demo", "--student", "yolo"))
    with pytest.raises(ConfigError, match="remove --student"):
        parse_run_arguments(("--config", "x.yaml", "--student", "co-detr"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("folder", *IMAGES, *CLOUD), "which classes"),
        (("folder", *IMAGES, *CLOUD, "--classes", ","), "which classes"),
        (("folder", "--classes", "a", *CLOUD), "which images"),
        (("folder", *IMAGES, "--classes", "a"), "which cloud"),
        (
            ("folder", *IMAGES, *CLOUD, "--config", "x.yaml"),
            "--config holds the whole configuration",
        ),
        (("--config", "absent.yaml"), "no config file"),
    ],
)
def test_what_is_missing_is_asked_for(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_arguments(arguments)


@pytest.mark.parametrize(
    "names", ["dog,Dog", "dog,dog", "stop sign,stop  sign", "dog,background"]
)
def test_impossible_classes(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with a message and exit code 2, whoever notices."""
    try:
        parse_run_arguments(("folder", *IMAGES, *CLOUD, "--classes", names))
    except (ConfigError, SystemExit) as error:
        code = error.exit_code if isinstance(error, ConfigError) else error.code
        message = str(error) + capsys.readouterr().err
    else:
        pytest.fail("accepted")
    assert code == 2
    assert "repeated" in message or "background" in message


@pytest.mark.parametrize(
    "arguments",
    [
        (*MINIMAL, "--distill.stepz", "5"),
        (*MINIMAL, "--seed", "many"),
        (*MINIMAL, "--until", "nowhere"),
        ("unheard_of",),
        (),
    ],
)
def test_unknown_settings_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert _exit_code(*arguments) == 2


def test_an_unknown_key_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _exit_code(*MINIMAL, "--distill.fit.stepz", "5")
    assert "distill.fit.stepz" in capsys.readouterr().err


@pytest.mark.parametrize("equals", [False, True])
def test_short_names(equals: bool) -> None:
    pairs = {
        "--images": "i",
        "--val": "v",
        "--test": "t",
        "--labeler": "none",
        "--cloud": "https://c",
    }
    arguments = (
        [f"{k}={v}" for k, v in pairs.items()]
        if equals
        else [part for pair in pairs.items() for part in pair]
    )
    config = parse_run_arguments(("folder", "--classes", "a", *arguments))[0]
    assert config.data == Folder("i", "v", "t")
    assert (config.collect.labeler, config.cloud.url) == ("none", "https://c")


def test_dotted_settings_and_options() -> None:
    arguments = (
        "--root",
        "s3://b/run",
        "--until",
        "collect",
        "--dry-run",
        "--baselines",
        "--distill.fit.steps",
        "7",
        "--seed",
        "3",
    )
    config, options = parse_run_arguments(("demo", *arguments))
    assert (config.distill.fit.steps, config.seed) == (7, 3)
    assert options == cli.RunOptions("s3://b/run", "collect", True, True)


@pytest.mark.parametrize(
    "arguments",
    [("dino-x,https://b",), ("dino-x", "https://b"), ("dino-x,", "https://b")],
)
@pytest.mark.parametrize("first", [False, True])
def test_several_clouds(arguments: tuple[str, ...], first: bool) -> None:
    settings = (
        "--more-clouds.1.usd-per-call",
        "0.01",
        "--more-clouds.1.max-usd",
        "5",
        "--ensemble.mode",
        "cascade",
        "--ensemble.reliability",
        "1",
        "2",
        "0.5",
    )
    cloud_arguments = ("--more-clouds", *arguments)
    arguments = (
        ("folder", *cloud_arguments, *MINIMAL[1:], *settings)
        if first
        else (*MINIMAL, *settings, *cloud_arguments)
    )
    config = parse_run_arguments(arguments)[0]
    assert [(c.service, c.url, c.max_usd) for c in config.clouds] == [
        ("http", "https://detector.example.com", None),
        ("dino-x", "", None),
        ("http", "https://b", 5.0),
    ]
    assert config.ensemble == Ensemble("cascade", (1.0, 2.0, 0.5))


def test_one_more_cloud_with_an_equals_sign() -> None:
    assert [
        c.service
        for c in parse_run_arguments((*MINIMAL, "--more-clouds=dino-x"))[0].clouds
    ] == [
        "http",
        "dino-x",
    ]
    assert parse_run_arguments(MINIMAL)[0].more_clouds == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--more-clouds", "dino-y"), "neither an address"),
        (("--more-clouds", "azure-vision"), "azure-vision has no public address"),
        (("--more-clouds", "https://detector.example.com"), "twice"),
        (
            (
                "--more-clouds",
                "dino-x",
                "--ensemble.mode",
                "cascade",
                "--labeler",
                "none",
            ),
            "cascade needs a second opinion on the first cloud's boxes",
        ),
    ],
)
def test_more_clouds_that_can_not_be_used(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_arguments((*MINIMAL, *arguments))


def test_settings_of_a_cloud_that_was_not_named() -> None:
    assert (
        _exit_code(*MINIMAL, "--more-clouds", "dino-x", "--more-clouds.1.max-usd", "5")
        == 2
    )


def test_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = parse_run_arguments(
        ("demo", "--seed", "5", "--more-clouds", "https://b", "dino-x")
    )[0]
    file.write_text(to_yaml(config))
    assert parse_run_arguments(("--config", str(file)))[0] == config


def test_errors_of_users_are_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["adapt", "folder"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("\nConfigError: which images")
    assert "Traceback" not in message


def test_baselines_alone_need_baselines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["adapt", "demo", "--until", "oracle", "--root", str(tmp_path)]) == 2
    assert "--baselines" in capsys.readouterr().err


def test_help_is_fast_and_light() -> None:
    """The time is the process's own, so that a busy machine does not fail the test."""
    code = (
        f"import json, runpy, sys, time\nsys.argv = [{str(FULL)!r}, '--help']\ntry:\n  "
        "  runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as"
        " end:\n    assert not end.code\nprint(json.dumps([sorted({'torch', 'ray',"
        " 'mlflow', 'open_clip'} & set(sys.modules)), time.process_time()]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=FULL.parents[1],
    )
    assert "--classes" in process.stdout
    heavy, seconds = json.loads(process.stdout.splitlines()[-1])
    assert heavy == []
    assert seconds < 3
