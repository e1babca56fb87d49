"""Run every benchmark, or those named, each in its own process; print a table and write `.bench/results.json`."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from tests.bench.registry import BENCHES

MODULES = ("traces", "capture", "costs", "fits", "placement", "sweep", "serving", "replay", "engine")
ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """Processor and cores, as they are written beside every figure."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def run_one(name: str) -> None:
    """Measure one benchmark in this process and print it as JSON."""
    found = BENCHES[name]()
    ratio = found.value / found.peer_value if found.peer_value else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"name": name, "value": found.value, "unit": found.unit, "peer": found.peer, "peer_value": found.peer_value, "ratio": ratio,
                      "peak_rss_B": peak, "machine": machine()}))  # fmt: skip


def main() -> int:
    """All of them; exit code 1 if one failed."""
    for module in MODULES:
        import_module(f"tests.bench.{module}")
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2])
        return 0
    results, failed = [], 0
    for name in sys.argv[1:] or BENCHES:
        done = subprocess.run([sys.executable, "-m", "tests.bench", "--one", name], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{name:34} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        peer = f"{row['ratio']:.2f} x {row['peer']}" if row["ratio"] else ""
        print(f"{name:34} {row['value']:>14,.4g} {row['unit']:28} {row['peak_rss_B'] / 2**20:>7,.0f} MiB  {peer}", flush=True)
    out = ROOT / ".bench" / "results.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{machine()}; wrote {out.relative_to(ROOT)}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
