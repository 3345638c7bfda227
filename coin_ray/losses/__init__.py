"""Losses: pure functions of tensors, named for what they compare. Means are over the
global batch (``coin_ray.parallel``).
"""
