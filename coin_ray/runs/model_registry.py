"""The images of a run as an MLflow dataset, its exported student as a registered model."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.config.mlflow_names import mlflow_name

LOADER = "coin_ray.predictors.mlflow_model"
"""Module with which MLflow loads a registered student."""
MAX_DIGEST = 36
"""Characters of a dataset's digest that MLflow takes."""
MODEL_FILES = ("model.json", "model.safetensors")


def image_dataset(uri: str, digest: str) -> Any:
    """Return the MLflow dataset of an image table: its URI and the hash of its contents."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    with warnings.catch_warnings():
        # MLflow warns that a local path matches two kinds of sources, which are the same
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(uri)
    return MetaDataset(source, name="images", digest=digest[:MAX_DIGEST])


def register_model_version(
    tracking: Tracking, run_id: str, export: str, figures: Mapping[str, float]
) -> str:
    """Log the export (a URI) as the next version of ``tracking.model``; return the version.

    ``figures`` are linked to the model, and ``tracking.alias`` moves to the version.
    """
    import mlflow

    assert tracking.model is not None
    model = mlflow_name(tracking.model, "model")
    alias = mlflow_name(tracking.alias, "alias")
    os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id):
        for name in MODEL_FILES:
            content = storage.read_bytes(storage.join(export, name))
            storage.write_bytes(storage.join(folder, name), content)
        logged_model = mlflow.pyfunc.log_model(
            name="student",
            loader_module=LOADER,
            data_path=folder,
            registered_model_name=model,
            pip_requirements=["coin-ray"],
        )
        if figures:
            legal_figures = {mlflow_name(n): number for n, number in figures.items()}
            mlflow.log_metrics(legal_figures, model_id=logged_model.model_id)
    version = str(logged_model.registered_model_version)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(model, alias, version)
    return version
