"""Accuracy of the modes and gates against dense attention, on a live server: `python -m benchmarks.accuracy`."""
