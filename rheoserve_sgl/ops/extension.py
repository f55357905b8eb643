"""The compiled extension, and the checks before a tensor's address is handed to it."""

import torch

# The order of rheo::DType in csrc/block_attention.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def extension():
    """The pybind11 module `rheoserve_sgl._C` (imported late: SGLang's main process never needs it)."""
    from rheoserve_sgl import _C

    return _C


def address(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple, name: str) -> int:
    """The address of a contiguous CPU tensor of this dtype and shape, or ValueError naming what differs."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {dtype} {tuple(shape)} on cpu"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()})")
    return tensor.data_ptr()
