"""The student's ONNX file, as written by ``pipelines/export.py``, read with
onnxruntime. Needs the extra ``onnx``.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from coin_ray.errors import ConfigError, InputError
from coin_ray.structures import Detections

OUTPUTS = ["boxes", "scores", "labels", "image", "probs"]


class OnnxStudent:
    """``classes`` and a session; ``predict`` answers as
    ``coin_ray.predictors.student.Predictor`` does. ``threads`` 0: all cores.
    """

    def __init__(self, data: bytes, threads: int = 1) -> None:
        """Raises ConfigError without onnxruntime, InputError if ``data`` is no exported
        student.
        """
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(
                "an exported model.onnx needs onnxruntime: pip install 'coin-ray[onnx]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common base
            raise InputError(f"model.onnx can't be loaded: {error}") from error
        properties = self._session.get_modelmeta().custom_metadata_map
        names = [output.name for output in self._session.get_outputs()]
        if names != OUTPUTS or "classes" not in properties:
            raise InputError(
                "expected an ONNX file written by pipelines/export.py with outputs"
                f" {OUTPUTS}; this one has {names}"
            )
        self.classes = tuple(properties["classes"].split("\n"))

    def predict(self, image: Image.Image) -> Detections:
        """Detections in pixels of ``image``, best first."""
        pixels = np.asarray(image.convert("RGB"))[None]
        boxes, scores, labels, _, probs = (
            torch.from_numpy(o) for o in self._session.run(OUTPUTS, {"images": pixels})
        )
        return Detections(boxes, scores, labels, probs)

    __call__ = predict
