"""What MLflow links to a run: the images as a dataset, the exported student as a
version of a registered model.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from coin_ray import storage
from coin_ray.config import Tracking

LOADER = "coin_ray.predictors.mlflow_model"
"""Module by which MLflow loads a registered student."""
DIGEST_LIMIT = 36


def image_set(uri: str, digest: str) -> Any:
    """An MLflow dataset: the table of the images (a URI) and the hash of what is in it."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    with warnings.catch_warnings():
        # a local path can be understood in two ways, which are the same
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(uri)
    return MetaDataset(source, name="images", digest=digest[:DIGEST_LIMIT])


def registered(
    tracking: Tracking, run: str, export: str, figures: Mapping[str, float]
) -> str:
    """Log the export (a URI) in ``run`` as the next version of ``tracking.model``,
    which the alias then names; returns the version.

    ``figures`` are linked to the model.
    """
    import mlflow

    assert tracking.model is not None
    os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
    with tempfile.TemporaryDirectory() as place, mlflow.start_run(run_id=run):
        for name in ("model.json", "model.safetensors"):
            storage.write_bytes(
                storage.join(place, name),
                storage.read_bytes(storage.join(export, name)),
            )
        made = mlflow.pyfunc.log_model(
            name="student",
            loader_module=LOADER,
            data_path=place,
            registered_model_name=tracking.model,
            pip_requirements=["coin-ray"],
        )
        if figures:
            mlflow.log_metrics(dict(figures), model_id=made.model_id)
    version = str(made.registered_model_version)
    mlflow.MlflowClient().set_registered_model_alias(
        tracking.model, tracking.alias, version
    )
    return version
