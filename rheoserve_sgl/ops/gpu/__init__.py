"""Triton kernels of a decode step, in the order in which a layer runs them: append, gate, score, plan, ask, attend.

All shapes are static and nothing is synchronised, so that they can be captured in a CUDA graph.
Not in use yet: only `ask` ran on a GPU so far, the others under Triton's interpreter.
"""
