"""Run the server under Ray Serve on a new Ray instance until SIGTERM: ``python
tests/soak/host.py EXPORT PORT QUEUE``."""

from __future__ import annotations

import signal
import sys

import ray
from ray import serve

from coin_ray.serving.application import ServeSettings, build


def main(export: str, port: str, queue: str) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(
        build(
            ServeSettings(
                serve="checkpoint", models=(export,), queue_max=int(queue), cpus=0.5
            )
        )
    )
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
