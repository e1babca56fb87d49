"""A training script that knows nothing of capture, but for the adapter of its own router."""

from __future__ import annotations

import argparse
import sys

import torch
from capture_scripts.tiny import TinyMoE, adapt, tokens

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--compile", choices=["no", "wrapped", "in-place"], default="no")
parser.add_argument("--exit", type=int, default=None)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--unknown", action="store_true")

if __name__ == "__main__":
    args = parser.parse_args()
    if not args.unknown:
        adapt()
    torch.manual_seed(0)
    model = TinyMoE()
    run = torch.compile(model, backend="eager") if args.compile == "wrapped" else model
    if args.compile == "in-place":
        model.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(args.steps):
        run(tokens(step)).sum().backward()
        optimizer.step()
    if args.fail:
        raise RuntimeError("the script's own fault")
    if args.exit is not None:
        sys.exit(args.exit)
