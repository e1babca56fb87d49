"""Zero-code capture: run a script or module unchanged and record the routing of the model it runs.

Every module call is looked at until the first one that holds routers; then the hooks go onto that model's own modules
and the look-out is taken away. It sits on `torch.nn.Module.__call__` rather than in torch's global module hooks: those
get no keyword arguments, and are compiled into the graph of a model that was compiled in place.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moesim.capture.discover import has_routers
from moesim.capture.recorder import Recorder
from moesim.capture.routers import router_like
from moesim.capture.session import capture
from moesim.errors import CaptureError, InputError
from moesim.model import ModelSpec


def run_script(argv: Sequence[str], out: str | Path, **options: Any) -> int:
    """Run `train.py ARGS…`, `-m MODULE ARGS…` or `torchrun … train.py ARGS…`; returns its exit status.

    `options` are those of `capture`. Under torchrun every process records its own rank into the one trace at `out`;
    other launchers can start `python -m moesim.capture.run OPTIONS_JSON train.py ARGS…` themselves.
    Exceptions of the script pass through once the trace is closed. Raises CaptureError when no routers were called,
    InputError when there is nothing to run, OutputExists when `out` holds another run.
    """
    if not argv:
        raise InputError("nothing to run: give a script, or -m and a module, after --")
    if Path(argv[0]).name == "torchrun" or list(argv[:2]) == ["-m", "torch.distributed.run"]:
        return _run_launcher(list(argv[1:] if argv[0] != "-m" else argv[2:]), out, options)
    with _Lookout(lambda model: capture(model, out, **options)) as lookout:
        status = _run_main(list(argv))
    if lookout.recorder is None and status == 0:
        raise CaptureError(lookout.explain())
    return status


class _Lookout:
    """Waits for the first call of a model with routers, and starts the recorder before that call runs."""

    def __init__(self, start: Callable[[nn.Module], Recorder]) -> None:
        self.recorder: Recorder | None = None
        self._start = start
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._candidates: set[str] = set()

    def __enter__(self) -> _Lookout:
        self._original = original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # torch.compile may hold on to this function after the look-out has ended
            if self._watching and module._modules and module not in self._checked:
                self._look(module)
            return original(module, *args, **kwargs)

        nn.Module.__call__, self._watching = call, True  # type: ignore[method-assign]
        return self

    def _look(self, module: nn.Module) -> None:
        if has_routers(module):
            self._stop()
            self.recorder = self._start(module)
        else:
            self._checked.update(module.modules())
            self._candidates |= {type(child).__name__ for child in module.modules() if router_like(child)}

    def _stop(self) -> None:
        nn.Module.__call__, self._watching = self._original, False  # type: ignore[method-assign]

    def explain(self) -> str:
        """Why there is no recorder."""
        names = ", ".join(sorted(self._candidates)) or "none"
        return (
            f"the script called no model with a router that is known; modules that look like one: {names}. "
            "Adapt it in the script with moesim.capture.register_router('ClassName', read); processes the script starts by itself are not followed"
        )

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self._stop()
        if self.recorder is not None:
            self.recorder.__exit__(kind, value, trace)


def _run_main(argv: list[str]) -> int:
    """Run as `python argv…` would, in this process."""
    module = argv[0] == "-m"
    if module and len(argv) < 2:
        raise InputError("-m needs the name of a module")
    if not module and not Path(argv[0]).is_file():
        raise InputError(f"{argv[0]}: no such script; check the path, or use -m for a module")
    saved = sys.argv, sys.path[:]
    sys.argv = argv[1:] if module else argv
    sys.path.insert(0, str(Path.cwd() if module else Path(argv[0]).resolve().parent))
    try:
        if module:
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return int(end.code or 0)
    finally:
        sys.argv, sys.path[:] = saved
    return 0


def _run_launcher(arguments: list[str], out: str | Path, options: dict[str, Any]) -> int:
    """torchrun with every worker started through this module."""
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)  # type: ignore[no-untyped-call]
    tail = [parsed.training_script, *parsed.training_script_args]
    own = [word for word in arguments[: len(arguments) - len(tail)] if word not in ("-m", "--module")]
    if parsed.module:
        tail = ["-m", *tail]
    spec = options.get("model_spec")
    data = options | {"out": str(out)} | ({"model_spec": spec.to_dict()} if isinstance(spec, ModelSpec) else {})
    command = [sys.executable, "-m", "torch.distributed.run", *own, "-m", "moesim.capture.run", json.dumps(data), *tail]
    return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """`python -m moesim.capture.run OPTIONS_JSON SCRIPT ARGS…`: what a launcher starts in each process."""
    options = json.loads(arguments[0])
    if isinstance(spec := options.get("model_spec"), dict):
        options["model_spec"] = ModelSpec.from_dict(spec)
    return run_script(arguments[1:], options.pop("out"), **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
