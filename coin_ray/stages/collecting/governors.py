"""A governor for each cloud of a collection, filled from the journal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from coin_ray.cloud.accounts import account_name, governor_limits
from coin_ray.cloud.governor import DAY, Governor, LocalGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.services import adapter_for
from coin_ray.config import Cloud, PipelineConfig, with_plain_rendering


def governors_for(
    config: PipelineConfig, urls: Sequence[str], journal: Journal
) -> list[LocalGovernor]:
    """Return a governor for each cloud, with what it has cost and how often it was asked
    today; the renderings of one cloud share it.

    A single cloud's budget is the journal's.
    """
    now = time.time()
    servers = [with_plain_rendering(cloud) for cloud in config.clouds]
    url_by_server: dict[Cloud, str] = dict(zip(servers, urls, strict=True))
    governors: dict[Cloud, LocalGovernor] = {}
    for cloud, url in url_by_server.items():
        account = account_name(cloud, url, adapter_for(cloud))
        spent = journal.spent(account if config.more_clouds else None)
        ages: list[float] = []
        if cloud.per_day is not None:
            starts = journal.call_starts(account, now - DAY)
            ages = [now - start for start in starts]
        governor = Governor(governor_limits(cloud), spent, ages=ages)
        governors[cloud] = LocalGovernor(governor)
    return [governors[cloud] for cloud in servers]
