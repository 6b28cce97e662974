"""The Conductor's metrics: read when they are asked for, from what its core counts anyway."""

from __future__ import annotations

from collections import Counter

from mooncake.metrics import Readings, Registry
from mooncake.scheduler.core import ConductorCore

_NAME = "mooncake_conductor_"
_REJECTED, _SOFT = "rejected_", "soft_"
_KINDS = ("ttft", "tbt")


def instrument_conductor(registry: Registry, core: ConductorCore) -> None:
    def instances() -> Readings:
        found: Counter[tuple[str, ...]] = Counter()
        for each in core.view.instances.values():
            found[str(each.info.role), str(each.info.state)] += each.connected
        return dict(found)

    def placements() -> Readings:
        """One of each request and choice; rejected: by reason; placed although admission would rather not: soft."""
        counts = core.counts
        found: Readings = {("placed", ""): counts["placed"]}
        for prefix, outcome in ((_REJECTED, "rejected"), (_SOFT, "soft")):
            for name, count in counts.items():
                if name.startswith(prefix):
                    found[outcome, name.removeprefix(prefix)] = count
        return found

    def errors() -> Readings:
        pairs = [(each.info.name, kind) for each in core.view.instances.values() for kind in _KINDS]
        found = {pair: core.accuracy.error(*pair) for pair in pairs}
        return {pair: error for pair, error in found.items() if error is not None}

    def queues() -> Readings:
        return {(each.info.name,): each.num_prefills for each in core.view.instances.values()}

    def batches() -> Readings:
        return {(each.info.name,): each.num_decodes for each in core.view.instances.values()}

    gauge, total = registry.gauge, registry.total
    gauge(_NAME + "instances", "Connected instances.", ("role", "state"), instances)
    total(
        _NAME + "placements",
        "Answers to requests to be placed, by outcome and reason.",
        ("outcome", "reason"),
        placements,
    )
    gauge(_NAME + "waiting", "Requests that wait for an instance.", (), lambda: {(): core.num_waiting})
    gauge(_NAME + "bookings", "Attempts placed and not over.", (), lambda: {(): len(core.books.bookings)})
    gauge(_NAME + "booked_prefills", "Prefills placed at an instance and not done.", ("instance",), queues)
    gauge(_NAME + "booked_decodes", "Attempts that decode at an instance, or will.", ("instance",), batches)
    gauge(
        _NAME + "prediction_error_ratio",
        "Mean of |predicted - actual| / actual of the last outcomes.",
        ("instance", "kind"),
        errors,
    )
    gauge(_NAME + "index_blocks", "Blocks that the prefix index knows.", (), lambda: {(): len(core.index)})
    total(_NAME + "index_refused", "Blocks that it had no room for.", (), lambda: {(): core.index.num_refused})
    total(_NAME + "replications", "Copies of hot prefixes asked for.", (), lambda: {(): core.counts["replicated"]})
