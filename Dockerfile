# Image of every node, for KubeRay (deploy/*.yaml) and instead of setup_commands in cluster.yaml:
#   docker build -t REGISTRY/coin-ray:0.1.0 . && docker push REGISTRY/coin-ray:0.1.0
# One image for CPU and GPU nodes: torch's wheel brings CUDA, the machine its driver. The base runs as the user `ray`, uid 1000.
FROM rayproject/ray:2.60.0-py311-cpu

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0

RUN mkdir -p /home/ray/coin_ray
WORKDIR /home/ray/coin_ray
COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users coin_ray ./coin_ray
COPY --chown=ray:users pipelines ./pipelines
COPY --chown=ray:users tune ./tune
RUN pip install --no-cache-dir ".[s3,aws,search]" "boto3>=1.34"

USER ray
