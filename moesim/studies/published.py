"""Published measurements that studies and tests compare with, as tables. Milliseconds, shares, tokens/s and GB as published.

Pre-gated MoE: raw data of its authors, kaleid-liner/FasterTransformer@c0bbdfc, performance_data (Apache-2.0). One
A100-SXM4-80GB under an EPYC 7V12, SwitchTransformer top-1, fp16, time of one MoE block of the decoder. Read-ME: NeurIPS
2024, arXiv 2410.19123, its table of hit ratios. ExpertFlow: arXiv 2410.17954, in its text.
"""

from __future__ import annotations

EXPERT_B = {"base": 2 * 768 * 3072 * 2.0, "large": 2 * 1024 * 4096 * 2.0}

# switch-large-128, batch 1: share of experts in place (LRU, 1, 3, 5, 10 and 20 % cached), block on demand, pre-gated.
CACHED = (
    (0.0358073, 2.56285, 1.36591),
    (0.103841, 2.47645, 1.36133),
    (0.183594, 2.39782, 1.35379),
    (0.372721, 2.12232, 1.33223),
    (0.730143, 1.66648, 1.32295),
)
# The same with experts on an SSD, 0, 1, 3, 5, 10 and 20 % cached: share in place under LFU (their script's policy), block on demand.
STORED = ((0.0, 7.706), (0.013, 7.116), (0.098, 6.636), (0.181, 6.147), (0.392, 5.016), (0.791, 2.606))
# Tokens/s pre-gated from the SSD, same rows (whole numbers; the fifth, below the fourth, contradicts its share in place), and from
# the host's memory without cache.
STORED_RATES = (11, 12, 13, 14, 12, 27)
LARGE_RATE = 42
# switch-base-16, batch 16: distinct experts forced, block all resident, pre-gated, on demand.
DISTINCT = ((1, 0.93, 1.11, 1.90), (2, 0.93, 2.10, 2.63), (4, 0.94, 3.40, 4.04), (8, 1.08, 6.73, 7.24), (16, 1.39, 15.17, 14.00))
# switch-base, batch 1, by experts: block all resident, pre-gated, on demand, all experts prefetched.
SINGLE = {
    8: (0.946295, 1.12774, 1.88722, 6.72681),
    16: (0.94747, 1.1561, 1.89436, 12.75),
    32: (0.941944, 1.12122, 1.74484, 27.2462),
    64: (0.947347, 1.12859, 1.77755, 51.031),
    128: (0.946341, 1.12682, 1.7899, 101.594),
    256: (0.961758, 1.15676, 1.81811, 199.715),
}
# switch-large-128, batch 1: pre-gated, on demand, all experts prefetched.
SINGLE_LARGE = (1.38823, 2.63063, 173.538)
# Tokens/s of switch-base, batch 1, by experts: all resident, pre-gated, on demand.
SINGLE_RATES = {8: (129, 112, 79), 16: (143, 115, 76), 32: (144, 116, 81), 64: (142, 113, 78), 128: (142, 109, 76), 256: (140, 103, 73)}
# Peak GB with batch 1: model, experts, on demand, pre-gated, all prefetched, all resident.
PEAKS = (("base", 64, 2.18, 2.19, 4.57, 9.40), ("base", 256, 4.17, 4.18, 13.8, 33.1), ("large", 128, 5.43, 5.47, 14.0, 56.9))

# Six experts by slots: share in place under random eviction, LRU and the Belady rule over queued requests.
READ_ME = {2: (0.3419, 0.3390, 0.4416), 3: (0.5014, 0.5242, 0.6182), 4: (0.6752, 0.6695, 0.7721), 5: (0.8291, 0.8348, 0.8803)}
READ_ME_BATCH = (5.08, 3.51)  # experts of a batch before and after batches by queue

# Switch-32, 16 slots: share in place by batch, planned and LRU; tokens/s without and with regrouping for 32, 64 and 128 experts.
EXPERTFLOW = {4: (0.9190, 0.7661), 16: (0.8591, 0.5837)}
EXPERTFLOW_REGROUPED = {32: (854, 882), 64: (681, 788), 128: (628, 735)}

# Tokens/s of 32 requests with 200 and 1,600 MB for experts over an SSD of 3.5 GB/s (D2MoE, arXiv 2504.15299, in its text).
D2MOE_RATES = (66.45, 83.14)

# s/token on one A5000 of 24 GB (README of MoE-Infinity): its own, Accelerate's (modules on demand), the best of those listed.
MOE_INFINITY = {
    "Switch-large-128": (0.130, 1.043, 1.043),
    "NLLB-MoE-54B": (0.119, 3.071, 3.071),
    "DeepSeek-V2-Lite": (0.155, 1.743, 0.493),
    "Mixtral-8x7B": (0.735, 6.633, 0.903),
}
