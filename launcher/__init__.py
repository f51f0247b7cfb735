"""Judgment and verbs: what a training run is, what it needs, and in what order."""

__version__ = "0.1.0"
