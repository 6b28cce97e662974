"""The metrics of store nodes and directories: read when they are asked for, from what these count anyway."""

from __future__ import annotations

from mooncake.core.types import NANOS_PER_S
from mooncake.metrics import Reading, Readings, Registry
from mooncake.store.directory.core import DirectoryCore
from mooncake.store.node import StoreNode
from mooncake.store.quotas import Tenant

_NODE = "mooncake_store_"
_DIRECTORY = "mooncake_directory_"
_ERRORS = {
    "auth_errors": "auth",
    "protocol_errors": "protocol",
    "faults": "bad_argument",
    "refusals": "refused",
    "conflicts": "conflict",
    "expired": "expired",
    "damaged": "damaged",
    "ssd_write_errors": "ssd_write",
    "ssd_read_errors": "ssd_read",
    "ssd_corrupt": "ssd_corrupt",
}
"""By name in `StoreNode.metrics`, the kind."""


def instrument_node(registry: Registry, node: StoreNode) -> None:
    """Of a node that has started."""
    tiers = {"dram": "", "ssd": "ssd_"} if len(node.core.tiers) > 1 else {"dram": ""}

    def by_tier(name: str) -> Reading:
        def read() -> Readings:
            now = node.metrics()
            return {(tier,): now[prefix + name] for tier, prefix in tiers.items()}

        return read

    def one(name: str) -> Reading:
        return lambda: {(): node.metrics()[name]}

    def hits() -> Readings:
        now = node.metrics()
        from_ssd = now.get("ssd_reads", 0)
        return {(tier,): from_ssd if tier == "ssd" else now["hits"] - from_ssd for tier in tiers}

    def errors() -> Readings:
        now = node.metrics()
        return {(kind,): now[name] for name, kind in _ERRORS.items() if name in now}

    gauge, total = registry.gauge, registry.total
    gauge(_NODE + "capacity_bytes", "Bytes that the tier has.", ("tier",), by_tier("capacity_bytes"))
    gauge(_NODE + "used_bytes", "Bytes taken, rounded up to the alignment.", ("tier",), by_tier("used_bytes"))
    gauge(_NODE + "evictable_bytes", "Bytes of objects that nobody leases.", ("tier",), by_tier("evictable_bytes"))
    gauge(_NODE + "objects", "Committed objects.", ("tier",), by_tier("objects"))
    total(_NODE + "hits", "Objects read, by the tier that they were in.", ("tier",), hits)
    total(_NODE + "local_hits", "Objects that clients here read without asking.", (), one("local_hits"))
    total(_NODE + "misses", "Objects asked for that were not there.", (), one("misses"))
    total(_NODE + "commits", "Objects that became visible.", (), one("commits"))
    total(_NODE + "committed_bytes", "Bytes of objects that became visible.", (), one("committed_bytes"))
    total(_NODE + "evictions", "Objects gone, by tier and cause.", ("tier", "cause"), lambda: _evictions(node))
    total(_NODE + "evicted_bytes", "Bytes evicted to make room.", ("tier",), by_tier("evicted_bytes"))
    total(_NODE + "transfer_bytes", "Bytes moved.", ("path", "direction"), lambda: _bytes(node))
    total(_NODE + "transfer_seconds", "Time spent moving.", ("path", "direction"), lambda: _seconds(node))
    gauge(_NODE + "leases", "Leases that were asked for and not released.", (), one("leases"))
    gauge(_NODE + "reservations", "Objects being written.", (), one("reservations"))
    gauge(_NODE + "granted", "Objects' worth of space granted to clients and not named yet.", (), one("granted"))
    gauge(_NODE + "lingering", "Objects to go that somebody still reads.", (), one("lingering"))
    gauge(_NODE + "clients", "Clients connected.", (), one("clients"))
    gauge(_NODE + "local_readers", "Clients that read without asking.", (), one("local_readers"))
    total(_NODE + "copied_objects", "Objects copied here from other nodes.", (), one("blocks_copied"))
    total(_NODE + "errors", "What went wrong, by kind.", ("kind",), errors)
    _instrument_tenants(registry, node)


def _instrument_tenants(registry: Registry, node: StoreNode) -> None:
    def by_tenant(number: str) -> Reading:
        return lambda: {(tenant.name,): getattr(tenant, number) for tenant in _tenants(node)}

    labels = ("tenant",)
    registry.gauge(_NODE + "tenant_used_bytes", "Memory of this node.", labels, by_tenant("used"))
    registry.gauge(_NODE + "tenant_elsewhere_bytes", "Memory of other nodes.", labels, by_tenant("elsewhere"))
    registry.gauge(_NODE + "tenant_quota_bytes", "Memory that it may fill.", labels, by_tenant("quota"))
    registry.total(_NODE + "tenant_refusals", "Objects over its quota.", labels, by_tenant("num_refused"))


def _tenants(node: StoreNode) -> list[Tenant]:
    return list(node.core.tenants())


def _evictions(node: StoreNode) -> Readings:
    now = node.metrics()
    over_quota = sum([tenant.num_evictions for tenant in _tenants(node)])
    found: Readings = {
        ("dram", "room"): now["evictions"] - over_quota,
        ("dram", "quota"): over_quota,
        ("dram", "removed"): now["removals"],
        ("dram", "damaged"): now["damaged"],
    }
    if "ssd_evictions" in now:
        found |= {("dram", "room_unsaved"): now["lost_evictions"], ("ssd", "room"): now["ssd_evictions"]}
        found["dram", "room"] -= now["lost_evictions"]
    return found


def _bytes(node: StoreNode) -> Readings:
    """What is written through mapped memory is what was committed and came no other way."""
    now = node.metrics()
    elsewhere = now["bytes_written"] + now["bytes_copied"]
    found: Readings = {
        ("shm", "read"): now["local_bytes"],
        ("shm", "write"): max(0, now["committed_bytes"] - elsewhere),
        ("socket", "read"): now["bytes_read"],
        ("socket", "write"): now["bytes_written"],
        ("copy", "write"): now["bytes_copied"],
    }
    return found | {("ssd", direction): moved.num_bytes for direction, moved in node.ssd_moved().items()}


def _seconds(node: StoreNode) -> Readings:
    """Clients move bytes of mapped memory by themselves: nobody here knows how long it takes."""
    now = node.metrics()
    found: Readings = {
        ("socket", "read"): now["read_ns"] / NANOS_PER_S,
        ("socket", "write"): now["write_ns"] / NANOS_PER_S,
        ("copy", "write"): now["copy_ns"] / NANOS_PER_S,
    }
    return found | {("ssd", direction): moved.seconds for direction, moved in node.ssd_moved().items()}


def instrument_directory(registry: Registry, core: DirectoryCore) -> None:
    def one(name: str) -> Reading:
        return lambda: {(): core.metrics()[name]}

    gauge, total = registry.gauge, registry.total
    gauge(_DIRECTORY + "nodes", "Store nodes that report.", (), one("nodes"))
    gauge(_DIRECTORY + "objects", "Objects that some node has.", (), one("objects"))
    gauge(_DIRECTORY + "wanted", "Objects of which several replicas are wanted.", (), one("wanted"))
    gauge(_DIRECTORY + "short", "Of them, those with fewer replicas than wanted.", (), one("short"))
    total(_DIRECTORY + "reported", "Objects that nodes said they gained or lost.", (), one("reported"))
    total(_DIRECTORY + "lookups", "Keys that were looked up.", (), one("lookups"))
    total(_DIRECTORY + "unknown", "Look-ups that nobody could answer yet.", (), one("unknown"))
    total(_DIRECTORY + "gaps", "Reports that were missed, each mended by a snapshot.", (), one("gaps"))
    total(_DIRECTORY + "copies_asked", "Replicas that nodes were asked to make.", (), one("copies_asked"))
    gauge(
        _DIRECTORY + "tenant_used_bytes",
        "Memory of all nodes, of tenants with a quota.",
        ("tenant",),
        lambda: {(tenant,): used for tenant, used in core.usage().items()},
    )
