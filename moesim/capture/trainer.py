"""Callbacks that capture from Hugging Face `Trainer` and from Lightning, with their step numbers."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moesim.capture.recorder import Recorder
from moesim.capture.session import capture


def trainer_callback(path: str | Path, **options: Any) -> Any:
    """A `transformers.TrainerCallback`: `Trainer(..., callbacks=[trainer_callback("traces/run1", domain="code")])`.

    `options` are those of `capture`. A step is an optimizer step; the forward passes of its accumulation are microbatches.
    """
    from transformers import TrainerCallback

    class RoutingCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
        recorder: Recorder | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.recorder = capture(kwargs["model"], path, **options)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.recorder is not None
            self.recorder.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.recorder is not None
            self.recorder.close()

    return RoutingCallback()


def lightning_callback(path: str | Path, **options: Any) -> Any:
    """A Lightning callback: `L.Trainer(callbacks=[lightning_callback("traces/run1")])`; `options` are those of `capture`.

    Derives from the Callback of `lightning` or `pytorch_lightning`, whichever is installed; without either it is a plain
    object with the same methods.
    """
    home = next((name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.split(".")[0])), None)
    base: Any = import_module(home).Callback if home else object

    class RoutingCallback(base):  # type: ignore[misc]
        recorder: Recorder | None = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.recorder = capture(pl_module, path, **options)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert self.recorder is not None
            self.recorder.step(trainer.global_step, microbatch=batch_idx % trainer.accumulate_grad_batches)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.recorder is not None
            self.recorder.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if self.recorder is not None:
                self.recorder.__exit__(type(exception), exception, None)

    return RoutingCallback()
