"""Students that were detectors before: pretrained networks, taught with ``Targets``."""
