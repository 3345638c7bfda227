"""The embedded default: a target domain, a tiny CLIP and a local "cloud" that need no
download.
"""
