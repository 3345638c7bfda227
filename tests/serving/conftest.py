from __future__ import annotations

import pytest

from coin_ray.predictors.student import write_exported_student
from tests.builders import CLASSES, tiny_detector


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported student, named harbour after its folder."""
    folder = str(tmp_path_factory.mktemp("runs") / "harbour")
    write_exported_student(tiny_detector(score_min=0.01), CLASSES, folder)
    return folder
