"""Capture: record which experts every token chooses in any running PyTorch model.

The package can be called: `moesim.capture(model, path)` is `moesim.capture.capture(model, path)`.
"""

import sys
from types import ModuleType

from moesim.capture.recorder import Recorder
from moesim.capture.routers import Adapter, register_router
from moesim.capture.session import capture
from moesim.capture.trainer import lightning_callback, trainer_callback

__all__ = ["Adapter", "Recorder", "capture", "lightning_callback", "register_router", "trainer_callback"]


class _Callable(ModuleType):
    __call__ = staticmethod(capture)


sys.modules[__name__].__class__ = _Callable
