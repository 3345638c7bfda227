"""What calls are counted under: the endpoint, the account and the governor's limits."""

from __future__ import annotations

import hashlib
import os

import httpx

from coin_ray import storage
from coin_ray.cloud.governor import Limits
from coin_ray.cloud.protocol import Adapter
from coin_ray.cloud.services import calls_per_minute, models_digest
from coin_ray.config import Cloud

RETRY_BURST_MIN = 20


def governor_limits(config: Cloud) -> Limits:
    """Return the governor's limits for a configuration, with calls per minute spread
    over the minute.
    """
    per_minute = calls_per_minute(config)
    rate = config.rate if per_minute is None else min(config.rate, per_minute / 60)
    return Limits(
        rate,
        config.in_flight,
        config.max_calls,
        config.max_usd,
        burst=max(1, round(rate / 10)),
        lease_seconds=2 * config.deadline + storage.current_patience(),
        per_minute=per_minute,
        per_day=config.per_day,
        retry_burst=max(RETRY_BURST_MIN, 2 * config.in_flight),
    )


def account_name(config: Cloud, url: str, adapter: Adapter) -> str:
    """Return the name [12 hexadecimal digits] under which the journal adds up the cost
    of a service, an address and a model.
    """
    endpoint = endpoint_name(config, httpx.URL(url))
    identity = f"{adapter.capabilities.name} {endpoint} {config.model}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def endpoint_name(config: Cloud, url: httpx.URL) -> str:
    """Return host and path; for a server started for this run, which has another port
    each time, its kind and its models.
    """
    if config.serve != "none":
        models = ",".join(os.path.basename(model) for model in config.onnx_models)
        return f"{config.serve}:{models}"
    return f"{url.netloc.decode()}{url.path.rstrip('/')}"


def answer_endpoint(config: Cloud, url: httpx.URL) -> str:
    """Return the endpoint as ``answer_key`` uses it, with a digest of local models:
    other weights under the same name give other answers.
    """
    digest = models_digest(config)
    endpoint = endpoint_name(config, url)
    return f"{endpoint}#{digest}" if digest else endpoint
