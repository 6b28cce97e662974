"""The figures of the FAST'25 paper, one function each: rows of what was published beside what is simulated.

A row without a published value is there to compare with, such as a strong baseline. A trace that is absent gives its rows
without a simulated value: no other trace stands in for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from mooncake.plan import fast25_published as published
from mooncake.plan.fast25_lab import Lab, Row, absent, capacity, row
from mooncake.plan.fast25_published import CONVERSATION, SYNTHETIC, TOOL_AGENT, TRACE_FILES
from mooncake.plan.replay import Outcome
from mooncake.sim.hit_rate import hit_rate
from mooncake.store.eviction import POLICIES

_DEFINITION_OPEN = "definition of the paper's local cache not given"
_VLLM_IDEAL = "the paper measured vLLM 0.5.1; the simulated one has no overhead on its host and holds more load"
_HANDOVER = "what the gap after the first token costs, which the rest of the KV takes to the decode instance"
_POOLS_OPEN = "pool sizes of this figure not given; at 8 prefill nodes recomputing is more than they can do"
_SWINGS = "of sequences running and waiting in a pool; swing: deviation over mean"
_KNOWN_LINKS = "of those tried; our Conductor knows the bandwidth, and fetches less KV where it is low"
_ASSUMED_LINKS = "of those tried; told that every node has the paper's network, it fetches KV whatever the bandwidth"
_STRONG, _OURS = "strong baseline", "ours"


def figure1(lab: Lab) -> Iterator[Row]:
    """Effective request capacity at three objectives for TBT, with a sweep of the load beside"""
    parameters = lab.parameters
    for name in TRACE_FILES:
        for at, tbt_s in enumerate(parameters.tbt_slos_s):
            known = published.FIG1_GAIN[name][at]
            if lab.trace(name) is None:
                yield absent("fig1", f"{_case(name, tbt_s)}: gain over the best vLLM", known, "gain", name)
            else:
                yield from _capacities(lab, name, at, tbt_s)
        if lab.trace(name) is not None:
            for speed in parameters.fig1_speeds:
                for tbt_s in parameters.tbt_slos_s:
                    yield from _gain(lab, name, tbt_s, speed)


def _case(name: str, tbt_s: float) -> str:
    return f"{name}, TBT {1000 * tbt_s:g} ms"


def _gain(lab: Lab, name: str, tbt_s: float, speed: float, *known: float | None) -> Iterator[Row]:
    """known: published gain, capacity of Mooncake, capacity of the best vLLM."""
    case, ttft_s = _case(name, tbt_s), lab.parameters.ttft_slo_s
    case += f", load x {speed:g}" if speed != 1.0 else ""
    mooncake = lab.mooncake(name, speed=speed)
    own = capacity(mooncake, ttft_s, tbt_s)
    best = max(capacity(outcome, ttft_s, tbt_s) for outcome in _vllm_kinds(lab, name, speed).values())
    gain, own_known, best_known = known or (None, None, None)
    yield row("fig1", f"{case}: gain over the best vLLM", gain, own / best - 1 if best else None, "gain", _VLLM_IDEAL)
    yield row("fig1", f"{case}: Mooncake", own_known, own, "share")
    apart = capacity(mooncake, ttft_s, tbt_s, handover=False)
    yield row("fig1", f"{case}: Mooncake, did the hand-over gap not count", None, apart, "share", _HANDOVER)
    yield row("fig1", f"{case}: best vLLM", best_known, best, "share", _VLLM_IDEAL)


def _capacities(lab: Lab, name: str, at: int, tbt_s: float) -> Iterator[Row]:
    case, ttft_s = _case(name, tbt_s), lab.parameters.ttft_slo_s
    is_known = name == CONVERSATION
    own = published.FIG1_MOONCAKE if is_known else None
    yield from _gain(
        lab, name, tbt_s, 1.0, published.FIG1_GAIN[name][at], own, published.FIG1_VLLM[at] if is_known else None
    )
    for kind, outcome in _vllm_kinds(lab, name).items():
        yield row("fig1", f"{case}: {kind}", None, capacity(outcome, ttft_s, tbt_s), "share")
    for kind, outcome in _strong_kinds(lab, name).items():
        yield row("fig1", f"{case}: {kind}", None, capacity(outcome, ttft_s, tbt_s), "share", _STRONG)
    joint = lab.mooncake(name, policy=lab.parameters.joint)
    yield row("fig1", f"{case}: Mooncake, {lab.parameters.joint}", None, capacity(joint, ttft_s, tbt_s), "share", _OURS)


def _vllm_kinds(lab: Lab, name: str, speed: float = 1.0) -> dict[str, Outcome]:
    chunk = lab.parameters.vllm_chunk_tokens
    return {
        "vLLM": lab.vllm(name, reuse="off", speed=speed),
        "vLLM, prefix caching": lab.vllm(name, speed=speed),
        "vLLM, chunked prefill": lab.vllm(name, reuse="off", max_step_tokens=chunk, speed=speed),
    }


def _strong_kinds(lab: Lab, name: str) -> dict[str, Outcome]:
    router, chunk = lab.parameters.strong_router, lab.parameters.vllm_chunk_tokens
    return {
        f"vLLM, prefix caching, {router}": lab.vllm(name, policy=router),
        f"vLLM, prefix caching, {router}, chunked": lab.vllm(name, policy=router, max_step_tokens=chunk),
    }


def figure5(lab: Lab) -> Iterator[Row]:
    """Mean TTFT by policy, and the ratios between them, with a sweep of the load beside."""
    policies = list(published.FIG5_TTFT_S)
    if lab.trace(CONVERSATION) is None:
        for policy in policies:
            yield absent("fig5", f"mean TTFT, {policy}", published.FIG5_TTFT_S[policy], "s", CONVERSATION)
        return
    means = {policy: _mean_ttft_s(lab.mooncake(CONVERSATION, policy=policy)) for policy in policies}
    for policy in policies:
        yield row("fig5", f"mean TTFT, {policy}", published.FIG5_TTFT_S[policy], means[policy], "s")
    joint = lab.parameters.joint
    yield row("fig5", f"mean TTFT, {joint}", None, _mean_ttft_s(lab.mooncake(CONVERSATION, policy=joint)), "s", _OURS)
    yield from _ratios(means, "", known=True)
    for speed in lab.parameters.fig5_speeds:
        if speed != 1.0:
            swept = {p: _mean_ttft_s(lab.mooncake(CONVERSATION, policy=p, speed=speed)) for p in policies}
            case = f", load x {speed:g}"
            for policy, mean in swept.items():
                yield row("fig5", f"mean TTFT, {policy}{case}", None, mean, "s")
            yield from _ratios(swept, case, known=False)


def _ratios(means: dict[str, float], case: str, *, known: bool) -> Iterator[Row]:
    """known: whether the paper has them."""
    times = published.FIG5_TTFT_S
    for worse, better in itertools.pairwise(means):
        ratio = round(times[worse] / times[better], 4) if known else None
        name = f"ratio of {worse} to {better}{case}"
        yield row("fig5", name, ratio, means[worse] / means[better], "ratio")


def _mean_ttft_s(outcome: Outcome) -> float:
    return (outcome.report.latency.ttft_ms.mean or 0.0) / 1000


def figure7(lab: Lab) -> Iterator[Row]:
    """Distributions of TTFT and TBT; the paper has curves, no numbers at hand."""
    if lab.trace(CONVERSATION) is None:
        yield absent("fig7", "TTFT and TBT", None, "s", CONVERSATION)
        return
    kinds = {"Mooncake": lab.mooncake(CONVERSATION)} | _vllm_kinds(lab, CONVERSATION)
    note = "no published number at hand"
    for kind, outcome in kinds.items():
        ttft, tbt = outcome.report.latency.ttft_ms, outcome.report.latency.tbt_ms
        for share in ("p50", "p90", "p99"):
            yield row("fig7", f"{kind}: TTFT {share}", None, getattr(ttft, share) / 1000, "s", note)
        for share in ("p50", "p90", "p99"):
            yield row("fig7", f"{kind}: TBT {share}", None, getattr(tbt, share), "ms", note)


def figure8(lab: Lab) -> Iterator[Row]:
    """GPU time of prefill per request."""
    for name in TRACE_FILES:
        time_name, saved_name = f"{name}: prefill GPU time, Mooncake", f"{name}: against vLLM"
        if lab.trace(name) is None:
            yield absent("fig8", time_name, published.FIG8_GPU_S[name], "s", name)
            yield absent("fig8", saved_name, published.FIG8_SAVED[name], "gain", name)
            continue
        own, plain, cached = (
            outcome.report.reuse.prefill_gpu_s or 0.0
            for outcome in (lab.mooncake(name), lab.vllm(name, reuse="off"), lab.vllm(name))
        )
        yield row("fig8", time_name, published.FIG8_GPU_S[name], own, "s", "published value read off the figure")
        yield row(
            "fig8", saved_name, published.FIG8_SAVED[name], own / plain - 1, "gain", "vLLM without prefix caching"
        )
        yield row("fig8", f"{name}: against vLLM, prefix caching", None, own / cached - 1, "gain")


def figure9(lab: Lab) -> Iterator[Row]:
    """Hit rate of one cache, as a share of that of an infinite one; by token."""
    parameters = lab.parameters
    for name in TRACE_FILES:
        case = f"{name}: {parameters.store_tokens / 1e6:g} M tokens, share of the maximum"
        if lab.trace(name) is None:
            yield absent("fig9", case, published.FIG9_SHARE[name], "share", name)
            continue
        most = _hit_rate(lab, name, None)
        yield row(
            "fig9", case, published.FIG9_SHARE[name], _hit_rate(lab, name, parameters.store_tokens) / most, "share"
        )
        large = _hit_rate(lab, name, parameters.large_cache_tokens) / most
        text = f"{name}: {parameters.large_cache_tokens / 1e6:g} M tokens, share of the maximum"
        yield row("fig9", text, None, large, "share", "published as near the maximum")
        yield row("fig9", f"{name}: maximum", None, most, "share", "hit rate by token")


def _hit_rate(lab: Lab, name: str, tokens: int | None) -> float:
    trace = lab.trace(name)
    block = trace.summary.info.format.block_tokens if trace is not None else None
    assert block is not None
    found = hit_rate(
        lab.requests(name), block, POLICIES[lab.parameters.eviction](), None if tokens is None else tokens // block
    )
    assert found is not None
    return found.by_token


def figure10(lab: Lab) -> Iterator[Row]:
    """One cache of all nodes against a cache of each node, prefill alone: one output token."""
    parameters = lab.parameters
    pools = {"prefill": parameters.fig10_prefill, "decode": 1, "output": 1}
    for name in TRACE_FILES:
        hits_name, gpu_name = f"{name}: hit rate, global over local", f"{name}: GPU time, global over local"
        if lab.trace(name) is None:
            yield absent("fig10", hits_name, published.FIG10_HITS[name], "ratio", name)
            yield absent("fig10", gpu_name, published.FIG10_GPU[name], "ratio", name)
            continue
        whole = lab.mooncake(name, **pools).report.reuse
        for router in ("least_load", parameters.strong_router):
            local = lab.mooncake(name, policy=router, **pools).report.reuse
            hits = (whole.hit_rate_by_token or 0.0) / (local.hit_rate_by_token or 1.0)
            gpu = (whole.prefill_gpu_s or 0.0) / (local.prefill_gpu_s or 1.0)
            yield row("fig10", f"{hits_name} ({router})", published.FIG10_HITS[name], hits, "ratio", _DEFINITION_OPEN)
            yield row("fig10", f"{gpu_name} ({router})", published.FIG10_GPU[name], gpu, "ratio", _DEFINITION_OPEN)


def figure13(lab: Lab) -> Iterator[Row]:
    """Mean TTFT by the bandwidth of a node's network."""
    parameters, knee_name = lab.parameters, "least bandwidth with mean TTFT below 2 s"
    if lab.trace(SYNTHETIC) is None:
        yield absent("fig13", knee_name, published.FIG13_KNEE_GBPS, "Gbps", SYNTHETIC)
        yield absent("fig13", "recompute", published.FIG13_RECOMPUTE_S, "s", SYNTHETIC)
        return
    assumed = parameters.fig13_assumed_gbps
    known = {gbps: _mean_ttft_s(lab.mooncake(SYNTHETIC, nic_gbps=gbps)) for gbps in parameters.fig13_gbps}
    unknown = {
        gbps: _mean_ttft_s(lab.mooncake(SYNTHETIC, nic_gbps=gbps, assumed_nic_gbps=assumed))
        for gbps in parameters.fig13_gbps
    }
    for means, name, note in (
        (unknown, f"{knee_name}, bandwidth not known", _ASSUMED_LINKS),
        (known, knee_name, _KNOWN_LINKS),
    ):
        good = [gbps for gbps, mean in means.items() if mean < published.FIG13_GOOD_S]
        yield row("fig13", name, published.FIG13_KNEE_GBPS, min(good, default=None), "Gbps", note)
    for prefill in (parameters.prefill, parameters.num_nodes):
        recompute = _mean_ttft_s(lab.mooncake(SYNTHETIC, reuse="off", prefill=prefill))
        name = f"recompute, {prefill} prefill nodes"
        yield row("fig13", name, published.FIG13_RECOMPUTE_S, recompute, "s", _POOLS_OPEN)
    for gbps, mean in unknown.items():
        yield row("fig13", f"{gbps:g} Gbps, not known", None, mean, "s")
    for gbps, mean in known.items():
        yield row("fig13", f"{gbps:g} Gbps", None, mean, "s")
    for gbps in parameters.fig13_gbps:
        mean = _mean_ttft_s(lab.mooncake(SYNTHETIC, nic_gbps=gbps, policy=parameters.joint))
        yield row("fig13", f"{gbps:g} Gbps, {parameters.joint}", None, mean, "s", _OURS)


def figure15(lab: Lab) -> Iterator[Row]:
    """Pools of different sizes, sixteen nodes in all."""
    parameters = lab.parameters
    splits = {prefill: f"{prefill}P+{parameters.num_nodes - prefill}D" for prefill in parameters.fig15_prefill}
    if lab.trace(SYNTHETIC) is None:
        for prefill, name in splits.items():
            yield absent("fig15", f"{name}: effective", published.FIG15_EFFECTIVE.get(prefill), "share", SYNTHETIC)
        return
    for prefill, name in splits.items():
        pools = {"prefill": prefill, "decode": parameters.num_nodes - prefill}
        outcome = lab.mooncake(SYNTHETIC, **pools)
        share = capacity(outcome, parameters.fig15_ttft_slo_s, parameters.fig15_tbt_slo_s)
        yield row("fig15", f"{name}: effective", published.FIG15_EFFECTIVE.get(prefill), share, "share")
        apart = capacity(outcome, parameters.fig15_ttft_slo_s, parameters.fig15_tbt_slo_s, handover=False)
        yield row("fig15", f"{name}: effective, did the hand-over gap not count", None, apart, "share", _HANDOVER)
        yield row("fig15", f"{name}: mean TTFT", published.FIG15_TTFT_S.get(prefill), _mean_ttft_s(outcome), "s")
        yield row(
            "fig15", f"{name}: mean TBT", published.FIG15_TBT_MS.get(prefill), outcome.report.latency.tbt_ms.mean, "ms"
        )
        joint = lab.mooncake(SYNTHETIC, policy=parameters.joint, **pools)
        share = capacity(joint, parameters.fig15_ttft_slo_s, parameters.fig15_tbt_slo_s)
        yield row("fig15", f"{name}: effective, {parameters.joint}", None, share, "share", _OURS)


def overload(lab: Lab) -> Iterator[Row]:
    """Rejections at twice the speed, by the rule of admission, and how the loads of the pools swing"""
    for name in (TOOL_AGENT, CONVERSATION, SYNTHETIC):
        known = published.OVERLOAD_REJECTED if name == TOOL_AGENT else {}
        if lab.trace(name) is None:
            for rule in published.OVERLOAD_REJECTED if known else ():
                yield absent("overload", f"{name}, {rule}: rejected", known[rule], "requests", name)
            continue
        for tbt_s in lab.parameters.overload_tbt_slos_s:
            for rule in published.OVERLOAD_REJECTED:
                yield from _overload(lab, name, rule, tbt_s, known.get(rule))


def _overload(lab: Lab, name: str, rule: str, tbt_s: float, known: float | None) -> Iterator[Row]:
    parameters = lab.parameters
    slo = f"ttft={parameters.ttft_slo_s:g},tbt={tbt_s:g}"
    outcome = lab.mooncake(name, speed=parameters.overload_speed, slo=slo, admission="hard", admission_rule=rule)
    requests, share = outcome.report.requests, outcome.report.service.effective_share
    together, prefill, decode = _swings(outcome)
    case = f"{name}, TBT {1000 * tbt_s:g} ms, {rule}"
    if tbt_s != parameters.overload_tbt_slos_s[0]:
        known = None
    note = "" if known else "not the trace, or not the objective, of the published table"
    yield row("overload", f"{case}: rejected", known, requests.rejected, "requests", note)
    yield row("overload", f"{case}: prefills for nothing", None, requests.wasted_prefills, "requests")
    yield row("overload", f"{case}: effective", None, share, "share")
    yield row("overload", f"{case}: correlation of prefill and decode load", None, together, "", _SWINGS)
    yield row("overload", f"{case}: swing of prefill load", None, prefill, "share", _SWINGS)
    yield row("overload", f"{case}: swing of decode load", None, decode, "share", _SWINGS)


def _swings(outcome: Outcome) -> tuple[float | None, float | None, float | None]:
    """Correlation of the loads of the pools over the run, and the deviation over mean of each. None: nothing swings."""
    replay = outcome.replay
    whole = replay.duration_ns // replay.bin_ns
    prefill, decode = (
        np.sum(
            [np.add(s.running[:whole], s.waiting[:whole]) for s in replay.load if s.role == role], axis=0, dtype=float
        )
        for role in ("prefill", "decode")
    )
    if whole < 2 or not prefill.std() or not decode.std():
        return None, None, None
    together = float(np.corrcoef(prefill, decode)[0, 1])
    return together, float(prefill.std() / prefill.mean()), float(decode.std() / decode.mean())


FIGURES: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "fig1": figure1,
    "fig5": figure5,
    "fig7": figure7,
    "fig8": figure8,
    "fig9": figure9,
    "fig10": figure10,
    "fig13": figure13,
    "fig15": figure15,
    "overload": overload,
}
