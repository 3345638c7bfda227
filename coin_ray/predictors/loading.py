"""Open any trained detector of this package by the path of its folder or one of its
files.
"""

from __future__ import annotations

from coin_ray import storage
from coin_ray.errors import InputError
from coin_ray.predictors.co_detr import CO_DETR_FILE, load_co_detr
from coin_ray.predictors.predictor import Predictor
from coin_ray.predictors.student import STUDENT_FILES, load_exported_student

EXPECTED = (
    "expected a folder with model.json and model.safetensors, as written by coin-ray"
    f" adapt and coin-ray export, a folder with {CO_DETR_FILE}, as written by coin-ray"
    " detector, one of these files, or model.onnx"
)


def open_predictor(path: str) -> Predictor:
    """Open a trained detector (a path or URI): the folder of an export, one of its
    files model.json, model.safetensors and model.onnx, a Co-DETR's ``.pt`` file or the
    folder it is in.

    Raises InputError for anything else, or if another version wrote it.
    """
    path = path.rstrip("/") or path
    folder, _, name = path.rpartition("/")
    if name.endswith(".pt"):
        return load_co_detr(path)
    if name.endswith(".onnx"):
        return _load_onnx_student(path)
    if name in STUDENT_FILES:
        return load_exported_student(folder or ".")
    if storage.exists(storage.join(path, STUDENT_FILES[0])):
        return load_exported_student(path)
    co_detr_file = storage.join(path, CO_DETR_FILE)
    if storage.exists(co_detr_file):
        return load_co_detr(co_detr_file)
    raise InputError(f"{path} is no trained detector: {EXPECTED}")


def _load_onnx_student(path: str) -> Predictor:
    from coin_ray.predictors.onnx_student import OnnxStudent

    if not storage.exists(path):
        raise InputError(f"no such file: {path}; {EXPECTED}")
    return OnnxStudent(storage.read_bytes(path))
