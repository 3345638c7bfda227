"""The student's ONNX file, as written by ``coin-ray export``, read with onnxruntime.
Needs the extra ``onnx``.
"""

from __future__ import annotations

import torch
from PIL import Image

from coin_ray.data.pixels import model_input, parse_range
from coin_ray.errors import ConfigError, InputError
from coin_ray.structures import Detections

OUTPUT_NAMES = ["boxes", "scores", "labels", "image", "probs"]


class OnnxStudent:
    """A ``Predictor`` that runs the bytes of ``model.onnx`` or ``model.int8.onnx`` with
    ``threads`` threads; 0: all cores.
    """

    def __init__(self, file_bytes: bytes, threads: int = 1) -> None:
        """Raise ConfigError without onnxruntime, InputError if the file is no exported
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
        providers = ["CPUExecutionProvider"]
        try:
            session = onnxruntime.InferenceSession(
                file_bytes, options, providers=providers
            )
        except Exception as error:  # onnxruntime's errors have no common base
            raise InputError(f"the ONNX file can't be loaded: {error}") from error
        metadata = session.get_modelmeta().custom_metadata_map
        names = [node.name for node in session.get_outputs()]
        if names != OUTPUT_NAMES or "classes" not in metadata:
            raise InputError(
                "expected an ONNX file written by coin-ray export, with outputs"
                f" {OUTPUT_NAMES} and the class names in its metadata; this one has"
                f" outputs {names}"
            )
        self._session, self._metadata = session, metadata
        self.classes: tuple[str, ...] = tuple(metadata["classes"].split("\n"))
        self.intensity_range = parse_range(metadata.get("intensity_range", ""))

    def __call__(self, image: Image.Image) -> Detections:
        """Return the detections in pixels of the upright ``image``, best first."""
        pixels = model_input(image, self._metadata)
        arrays = self._session.run(OUTPUT_NAMES, {"images": pixels})
        boxes, scores, labels, _, probs = map(torch.from_numpy, arrays)
        return Detections(boxes, scores, labels, probs)

    def predict(self, image: Image.Image) -> Detections:
        """Return the same as a call, by the name of version 0.1."""
        return self(image)
