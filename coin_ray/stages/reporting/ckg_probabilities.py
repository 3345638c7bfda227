"""The probabilities that the trained fusion network (CKG) gives the cloud's boxes in the
test images. A diagnosis: nothing is trained or selected by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.prototypes import Prototypes
from coin_ray.runs.steps import Context
from coin_ray.stages.common.image_tables import ImageRow
from coin_ray.stages.common.prediction import read_image
from coin_ray.stages.common.students import empty_region_student
from coin_ray.stages.common.teacher_outputs import prepare_cloud_for_separation
from coin_ray.stages.common.training_job import load_weights
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections

CKG_FILE = "ckg.pt"
"""The state of ``combine_fusion_modules``, in the distillation's folder."""
MAX_IMAGES = 100
"""If there are more images, so many of them are used, evenly spread."""


def predict_ckg_probabilities(
    context: Context[PipelineConfig],
    images: Sequence[ImageRow],
    answers: PredictionsByMethod,
) -> dict[str, Tensor]:
    """Return CKG's probabilities [N, K+1] of the cloud's boxes above the training
    threshold, by image id; empty if the run has no trained CKG.
    """
    config = context.config
    ckg_weights = storage.join(context.inputs["distill"], CKG_FILE)
    if (
        config.distill.fusion != "ckg"
        or "clip_labels" not in answers
        or not storage.exists(ckg_weights)
    ):
        return {}
    student_weights = storage.join(context.inputs["distill"], WEIGHTS)
    fusion = _TrainedFusion(config, student_weights, ckg_weights)
    cloud = answers["cloud"]
    clip = answers["clip_labels"]
    answered = [
        row for row in images if row["image_id"] in cloud and row["image_id"] in clip
    ]
    probs = {}
    for row in _spread_evenly(answered, MAX_IMAGES):
        image_id = row["image_id"]
        probs[image_id] = fusion.predict(row["uri"], cloud[image_id], clip[image_id])
    return probs


def _spread_evenly(rows: Sequence[ImageRow], count: int) -> list[ImageRow]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def combine_fusion_modules(
    ckg: nn.Module, cloud_prototypes: nn.Module, clip_prototypes: nn.Module
) -> nn.ModuleDict:
    """Return CKG and the two banks of prototypes it attends to as one module with one
    state.
    """
    return nn.ModuleDict(
        {
            "ckg": ckg,
            "cloud_prototypes": cloud_prototypes,
            "clip_prototypes": clip_prototypes,
        }
    )


class _TrainedFusion:
    def __init__(
        self, config: PipelineConfig, student_weights: str, ckg_weights: str
    ) -> None:
        self.config = config
        use_gpu = config.distill.fit.gpu and torch.cuda.is_available()
        self.device = torch.device("cuda" if use_gpu else "cpu")
        backbone = load_backbone(config)
        self.student = empty_region_student(backbone, config, seed=config.seed)
        self.student.load_state_dict(load_weights(student_weights))
        self.student.to(self.device).eval()
        embeddings = starting_embeddings(backbone, config)
        self.ckg = ConsistentKnowledge(
            embeddings.shape[1], len(config.classes), config.distill.ckg_heads
        )
        cloud_bank = Prototypes(embeddings)
        clip_bank = Prototypes(embeddings)
        fusion = combine_fusion_modules(self.ckg, cloud_bank, clip_bank)
        fusion.load_state_dict(load_weights(ckg_weights))
        fusion.to(self.device)
        self.prototypes = (cloud_bank.normalised(), clip_bank.normalised())

    @torch.no_grad()
    def predict(self, uri: str, cloud: Detections, clip: Detections) -> Tensor:
        """Return the fused probabilities [N, K+1], on the CPU, of the cloud's boxes
        above the training threshold.
        """
        confident = cloud.scores >= self.config.labels.score_min
        if not confident.any():
            return cloud.probs[confident]
        original = read_image(uri, self.config.intensity_range)
        detector = self.config.detector
        resized = resize_to_fit(original, detector.short_side, detector.long_side)
        boxes = box_ops.scale_boxes(
            cloud.boxes[confident],
            resized.shape[2] / original.shape[2],
            resized.shape[1] / original.shape[1],
        )
        embeddings = self._embed(resized, boxes)
        cloud_probs = prepare_cloud_for_separation(cloud, self.config.labels).probs
        clip_probs = clip.probs[confident]
        fused: Tensor = self.ckg(
            embeddings,
            self.prototypes,
            cloud_probs.to(self.device),
            clip_probs.to(self.device),
        )
        return fused.cpu()

    def _embed(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the student's embeddings [N, E] of the boxes."""
        shared, _ = self.student.propose(self.student.prepare([image]))
        regions = self.student.describe(shared, [boxes.to(self.device)])  # type: ignore[arg-type]
        embeddings: Tensor = regions.embedded
        return embeddings
