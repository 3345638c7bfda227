"""The parts that all calls of one client share."""

from __future__ import annotations

from dataclasses import dataclass

from coin_ray.cloud.call_admission import CallAdmission
from coin_ray.cloud.http.connections import Connections
from coin_ray.cloud.protocol import Adapter
from coin_ray.cloud.responses import ReplyJournal
from coin_ray.cloud.timing import Timing
from coin_ray.config import Cloud


@dataclass(frozen=True, slots=True)
class ServiceSession:
    """What is needed to call one service."""

    config: Cloud
    adapter: Adapter
    connections: Connections
    replies: ReplyJournal
    admission: CallAdmission
    timing: Timing
