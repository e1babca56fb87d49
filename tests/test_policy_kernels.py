"""Compiled kernels are kept on disk; what is kept must be what the sources say now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOOP = """
from moesim.jit import specialised
def victim(x):
    return 0
def loop(x):
    return 10 * victim(x)
"""
CALLED = "from moesim.jit import inlined\n@inlined\ndef chosen(x):\n    return x + {add}\n"
HOOKS = """
from called import chosen
from loop import loop
from moesim.jit import compiled, inlined, specialised
STEP = {step}
@inlined
def mine(x):
    return chosen(x) {sign} STEP
kernel = specialised(loop, "mine", {{"victim": mine}})
@compiled
def plain(x):
    return chosen(x)
print(kernel(1), plain(1))
"""


def printed(folder: Path, **words: object) -> str:
    """What a process of its own prints that runs `HOOKS`, written anew."""
    for name, text in {"loop.py": LOOP, "called.py": CALLED, "hooks.py": HOOKS}.items():
        path = folder / name
        if not path.exists() or path.read_text() != text.format(**words):
            path.write_text(text.format(**words))
    os.utime(folder / "hooks.py", (0, 0))  # an edit that keeps size and time goes unnoticed by numba's own stamp
    done = subprocess.run(
        [sys.executable, "-B", "hooks.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_kernel_on_disk_follows_its_hooks_and_what_they_call(tmp_path: Path) -> None:
    """A policy's loop is in one file, its hooks in another, what they call in a third: an edit of any gives other results at once."""
    assert printed(tmp_path, add=1, sign="+", step=1) == "30 2"
    assert printed(tmp_path, add=1, sign="-", step=1) == "10 2"  # the hook
    assert printed(tmp_path, add=5, sign="-", step=1) == "50 6"  # what it calls
    assert printed(tmp_path, add=5, sign="-", step=2) == "40 6"  # a number it reads
    files = sorted(path.name for path in (tmp_path / "__pycache__").glob("*.nbi"))
    assert printed(tmp_path, add=1, sign="+", step=1) == "30 2"
    assert sorted(path.name for path in (tmp_path / "__pycache__").glob("*.nbi")) == files  # found again, not compiled anew
