"""Files written by `torch.save`, opened with `weights_only=True`: tensors and plain containers, never code."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError


def load_torch(path: Path) -> Any:
    """Content of the file with every tensor as a NumPy array; TraceError when it is damaged or holds anything but data."""
    if not path.exists():
        raise TraceError(f"{path}: no such file; check the path")
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of its own pickle reader; what it refuses is raised below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        reason = _first_line(problem)
        raise TraceError(f"{path}: refused: holds more than tensors and plain values ({reason}); nothing of it was run; record it again") from None
    except Exception as problem:  # a damaged stream makes torch's reader raise whatever the bytes spell
        raise TraceError(f"{path}: not a complete torch.save file: {_first_line(problem)}; it was cut short or is something else") from None
    return _plain(loaded, torch, path)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def _plain(value: Any, torch: Any, path: Path) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() > 16 * max(path.stat().st_size, 1):
            # a small file may state a huge expanded view of few bytes
            raise TraceError(f"{path}: a tensor of shape {list(value.shape)} in a file of {path.stat().st_size:,} bytes; record it again")
        array: NDArray[Any] = value.detach().to(torch.float32 if value.dtype == torch.bfloat16 else value.dtype).numpy()
        return np.ascontiguousarray(array)
    if isinstance(value, dict):
        return {key: _plain(item, torch, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, torch, path) for item in value]
    return value
