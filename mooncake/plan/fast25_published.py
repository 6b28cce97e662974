"""What the paper publishes, by figure: FACTS.md, section 2. [fig]: read off a figure, with an error of 3 to 5 %."""

from __future__ import annotations

CONVERSATION, TOOL_AGENT, SYNTHETIC = "conversation", "toolagent", "synthetic"
TRACE_FILES = {
    CONVERSATION: "conversation_trace.jsonl",
    TOOL_AGENT: "toolagent_trace.jsonl",
    SYNTHETIC: "synthetic_trace.jsonl",
}
"""As the release of the paper's traces names them."""

FIG1_GAIN = {
    CONVERSATION: (4.98, 1.57, 0.59),
    TOOL_AGENT: (0.64, 0.42, 0.22),
    SYNTHETIC: (0.62, 0.40, 0.28),
}
"""Capacity over that of the best vLLM, less one, at TBT objectives of 100, 200 and 300 ms."""
FIG1_MOONCAKE = 0.98
"""Conversation: between 96 and 100 %."""
FIG1_VLLM = (0.16, 0.39, 0.63)
"""Conversation, best vLLM [fig]."""
FIG5_TTFT_S = {"random": 19.65, "least_load": 5.27, "local_cache_aware": 3.58, "algorithm1": 3.07}
FIG8_SAVED = {CONVERSATION: -0.36, TOOL_AGENT: -0.53, SYNTHETIC: -0.64}
FIG8_GPU_S = {CONVERSATION: 1.07, TOOL_AGENT: 0.54, SYNTHETIC: 0.75}
"""[fig]"""
FIG9_SHARE = {CONVERSATION: 0.41, TOOL_AGENT: 0.75, SYNTHETIC: 0.46}
FIG10_HITS = {CONVERSATION: 2.22, TOOL_AGENT: 1.38, SYNTHETIC: 2.36}
FIG10_GPU = {CONVERSATION: 0.76, TOOL_AGENT: 0.74, SYNTHETIC: 0.52}
FIG13_RECOMPUTE_S = 2.6
"""[fig]"""
FIG13_KNEE_GBPS = 100.0
FIG13_GOOD_S = 2.0
FIG15_EFFECTIVE = {5: 0.777, 6: 0.972, 7: 0.991, 8: 0.990, 9: 0.992, 10: 0.984, 11: 0.861}
FIG15_TTFT_S = {5: 5.7, 11: 1.1}
FIG15_TBT_MS = {5: 31.0, 11: 58.0}
"""By the number of prefill nodes; times [fig]."""
OVERLOAD_REJECTED = {"baseline": 4183, "early": 3771, "early_predicted": 3589}
"""Of 23,000 requests at twice the speed, 8P + 8D (arXiv v1)."""
