"""Detectors that are trained on labelled images: their settings, presets and steps."""
