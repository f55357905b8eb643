"""Triton kernels of a decode step, in the order in which a layer runs them: append, gate, score, plan, ask, attend.

All shapes are static and nothing is synchronised, so that they can be captured in a CUDA graph.
"""
