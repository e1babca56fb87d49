"""Routing traces: which experts each token chose in each MoE layer."""

from moesim.trace.schema import NO_EXPERT, TraceInfo
from moesim.trace.stats import TraceStats, drift_bits
from moesim.trace.trace import Trace, TraceBatch, load_trace
from moesim.trace.writer import Coded, TraceWriter

__all__ = ["NO_EXPERT", "Coded", "Trace", "TraceBatch", "TraceInfo", "TraceStats", "TraceWriter", "drift_bits", "load_trace"]
