"""The loader module of MLflow models that were registered by earlier versions."""

from coin_ray.predictors.mlflow_model import _load_pyfunc as _load_pyfunc
