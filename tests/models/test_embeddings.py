from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coin_ray.config import MobileNet
from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import InputError
from coin_ray.models.faster_rcnn_clip.embeddings import (
    ClassVectors,
    initial_vectors,
    load_coco_text_vectors,
)


@pytest.fixture
def matrix(tmp_path: Path) -> str:
    """Row k is k + 1 times the k-th unit vector."""
    np.save(
        tmp_path / "text.npy",
        (np.eye(80) * np.arange(1, 81)[:, None]).astype(np.float16),
    )
    return str(tmp_path / "text.npy")


def test_there_are_80_different_classes() -> None:
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80


def test_learned_vectors_are_given_in_unit_length_also_by_a_teacher_that_is_not_trained() -> (
    None
):
    vectors = ClassVectors(torch.randn(3, 8), learned=True)
    assert vectors.values.requires_grad
    torch.testing.assert_close(vectors().norm(dim=1), torch.ones(3))
    torch.testing.assert_close(
        vectors.requires_grad_(False)().norm(dim=1), torch.ones(3)
    )


def test_fixed_vectors_are_given_bit_for_bit_and_do_not_learn() -> None:
    embeddings = torch.randn(3, 8)
    vectors = ClassVectors(embeddings, learned=False)
    assert torch.equal(vectors(), embeddings)
    assert not vectors.values.requires_grad


def test_text_vectors_are_chosen_by_name_in_the_order_of_the_classes(
    matrix: str,
) -> None:
    vectors = load_coco_text_vectors(matrix, ("Dog", "person"))
    assert vectors.dtype == torch.float32
    assert vectors.argmax(1).tolist() == [COCO_CLASSES.index("dog"), 0]


def test_initial_vectors_are_text_and_a_random_background(matrix: str) -> None:
    vectors = initial_vectors(MobileNet(text_vectors=matrix), ("dog", "person"), seed=0)
    assert vectors.shape == (3, 80)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[1, 0] == 1
    assert (vectors[2] != 0).sum() > 70


@pytest.mark.parametrize("text", [True, False])
def test_initial_vectors_repeat_for_a_seed(matrix: str, text: bool) -> None:
    config = MobileNet(text_vectors=matrix if text else None, vector_size=16)
    assert torch.equal(
        initial_vectors(config, ("dog",), seed=1),
        initial_vectors(config, ("dog",), seed=1),
    )
    assert not torch.equal(
        initial_vectors(config, ("dog",), seed=1),
        initial_vectors(config, ("dog",), seed=2),
    )


def test_learned_vectors_need_no_known_names() -> None:
    assert initial_vectors(
        MobileNet(vector_size=16), ("rider", "kerb"), seed=0
    ).shape == (3, 16)


def test_unknown_classes_are_named(matrix: str) -> None:
    with pytest.raises(InputError, match="not rider, kerb"):
        load_coco_text_vectors(matrix, ("dog", "rider", "kerb"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_coco_text_vectors(str(tmp_path / "absent.npy"), ("dog",))
    (tmp_path / "text.npy").write_text("no matrix")
    with pytest.raises(InputError, match=r"is not a \.npy file"):
        load_coco_text_vectors(str(tmp_path / "text.npy"), ("dog",))
    np.save(tmp_path / "text.npy", np.zeros((365, 8)))
    with pytest.raises(InputError, match=r"one row per COCO class; got \[365, 8\]"):
        load_coco_text_vectors(str(tmp_path / "text.npy"), ("dog",))
