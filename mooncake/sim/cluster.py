"""The simulated cluster: every process of a live one, in one thread, from one configuration and one seed.

frontends (dispatcher) --> conductor <-- instances (prefill, decode: core + engine), store nodes
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from mooncake.core.messages import CONDUCTOR, AnyMessage, Send
from mooncake.core.types import NANOS_PER_S, CostModel, InstanceInfo, Role
from mooncake.engine.base import EngineLimits
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.core import ConductorCore, PeerGone, Received, Tick
from mooncake.scheduler.dispatcher import DispatcherLimits
from mooncake.sim.copier import SimCopier
from mooncake.sim.engine import EngineConfig
from mooncake.sim.frontend import FRONTEND_LOST, Model, RequestRecord, SimFrontend, SimRequest
from mooncake.sim.instance import InstanceConfig, SimInstance
from mooncake.sim.loop import CoreRunner, Loop, Observer
from mooncake.sim.network import Network, NetworkConfig, Peer
from mooncake.sim.node import SHARD, NodeClient, NodeConfig, SimNode
from mooncake.store.events import SsdRecovered

_COMPAT = "simulated"


class ClusterConfig(msgspec.Struct, frozen=True):
    """Prefill instances are dealt out to the nodes in turn, the others from the last node on."""

    prefill: int = 2
    decode: int = 2
    colocated: int = 0
    nodes: int = 2
    frontends: int = 1
    block_tokens: int = 64
    page_tokens: int = 16
    num_pages: int = 2048
    """Of each instance."""
    prefill_batch: int = 8
    decode_batch: int = 32
    max_step_tokens: int = 512
    max_context: int = 16_384
    cost: CostModel = CostModel((2.0, 40.0, 0.5), (5.0, 0.05, 10.0))
    host_ns: int = 0
    one_step: bool = False
    engine_fault: float = 0.0
    network: NetworkConfig = NetworkConfig()
    node: NodeConfig = NodeConfig()
    conductor: ConductorConfig = ConductorConfig(block_tokens=64, kv_token_bytes=1024)
    dispatcher: DispatcherLimits = DispatcherLimits(part_tokens=64)
    """Its part_tokens are those of prefill instances too."""

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            self.num_pages,
            self.page_tokens,
            self.block_tokens,
            self.prefill_batch,
            self.max_step_tokens,
            self.max_context,
        )


Watch = Callable[[int, str, Any, Any, list[Any]], None]
"""(now, name of the process, core, event, commands), after every event of every core."""


class SimConductor:
    def __init__(
        self, config: ConductorConfig, seed: int, loop: Loop, network: Network, observe: Observer | None
    ) -> None:
        self.core = ConductorCore(config, random.Random(seed))
        actions: dict[type, Callable[[Any], None]] = {
            Send: lambda command: network.send(CONDUCTOR, command.to, command.message)
        }
        self.runner = CoreRunner(loop, CONDUCTOR, self.core, actions, Tick(), observe)

    def kill(self) -> None:
        self.runner.stop()

    def opened(self, peer: str) -> None:
        """Peers introduce themselves."""

    def gone(self, peer: str) -> None:
        self.runner.handle(PeerGone(peer))

    def received(self, sender: str, messages: list[AnyMessage]) -> None:
        for message in messages:
            self.runner.handle(Received(sender, message))


class SimCluster:
    """Processes have names: conductor, frontend-0, node-0, prefill-0, decode-0 and so on. An epoch counts the lives of
    a node or instance, and an instance begins another one with each role that it takes."""

    def __init__(self, config: ClusterConfig, seed: int, watch: Watch | None = None) -> None:
        self.config = config
        self.rng = random.Random(seed)
        self.loop = Loop()
        self.network = Network(self.loop, config.network, self.rng)
        self.network.on_cut(self._cut)
        self.records: list[RequestRecord] = []
        self.model = Model()
        self.conductor: SimConductor | None = None
        self.frontends: dict[str, SimFrontend] = {}
        self.nodes: dict[str, SimNode] = {}
        self.instances: dict[str, SimInstance] = {}
        self.num_running = 0
        self._lives: dict[str, int] = {}
        self._on_ssd: dict[str, SsdRecovered] = {}
        """Of nodes that were killed."""
        self._watch = watch
        self._node_of: dict[str, str] = {}
        self._arrivals_left = 0
        self.num_submitted = 0
        self._on_end: Callable[[RequestRecord], None] | None = None
        for name in self.names:
            self.start(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All processes, in the order of their start."""
        config = self.config
        kinds = (
            ("node", config.nodes),
            ("prefill", config.prefill),
            ("decode", config.decode),
            ("colocated", config.colocated),
            ("frontend", config.frontends),
        )
        return (CONDUCTOR, *(f"{kind}-{at}" for kind, count in kinds for at in range(count)))

    # ------------------------------------------------------------------ requests

    def submit(self, requests: Iterable[SimRequest]) -> None:
        """Each goes to a frontend in turn when its time comes."""
        for request in requests:
            record = self._new_record(request)
            self.records.append(record)
            self.loop.at(request.arrival_ns, self._arrive, record)

    def feed(self, requests: Iterator[SimRequest], on_end: Callable[[RequestRecord], None]) -> None:
        """As `submit`, for any number of requests in order of arrival: each is drawn when the one before it arrives. A record
        is given to on_end when its request has ended, and not kept."""
        self._on_end = on_end
        self._draw_next(requests)

    def _draw_next(self, requests: Iterator[SimRequest]) -> None:
        request = next(requests, None)
        if request is not None:
            self.loop.at(request.arrival_ns, self._arrive_and_draw, self._new_record(request), requests)

    def _arrive_and_draw(self, record: RequestRecord, requests: Iterator[SimRequest]) -> None:
        self._draw_next(requests)
        self._arrive(record)

    def _new_record(self, request: SimRequest) -> RequestRecord:
        record = RequestRecord(self.num_submitted, request)
        self.num_submitted += 1
        self._arrivals_left += 1
        return record

    def run(self, until: int) -> None:
        """Until all requests have ended, or until that time."""
        self.loop.run(until)

    def settle(self, duration: int = 20 * NANOS_PER_S) -> None:
        """Let what is left over be found and cleared away."""
        self.loop.run(self.loop.now + duration)

    def _arrive(self, record: RequestRecord) -> None:
        self._arrivals_left -= 1
        name = f"frontend-{record.number % self.config.frontends}"
        self.num_running += 1
        frontend = self.frontends.get(name)
        if frontend is None:
            record.end(FRONTEND_LOST)
            self._ended(record)
        else:
            frontend.start(record)

    def _ended(self, record: RequestRecord) -> None:
        self.num_running -= 1
        if self._on_end is not None:
            self._on_end(record)
        if not self.num_running and not self._arrivals_left:
            self.loop.stop()

    # ------------------------------------------------------------------ processes

    def alive(self, name: str) -> bool:
        return name in self.frontends or name in self.nodes or name in self.instances or self._is_conductor(name)

    def _is_conductor(self, name: str) -> bool:
        return name == CONDUCTOR and self.conductor is not None

    def start(self, name: str) -> None:
        """A new life of that process."""
        kind, _, number = name.partition("-")
        process: Peer
        if kind == CONDUCTOR:
            process = self.conductor = self._new_conductor()
        elif kind == "frontend":
            process = self.frontends[name] = self._new_frontend(name)
        elif kind == "node":
            process = self.nodes[name] = self._new_node(name)
        else:
            process = self.instances[name] = self._new_instance(name, Role(kind), int(number))
        self.network.start(name, process)
        if kind != CONDUCTOR:
            self.network.dial(name, CONDUCTOR)

    def kill(self, name: str) -> None:
        """As by kill -9. Dead processes are left alone."""
        if not self.alive(name):
            return
        self._flush()
        self.network.kill(name)
        if name == CONDUCTOR:
            assert self.conductor is not None
            self.conductor.kill()
            self.conductor = None
        if name in self.nodes and (left := self.nodes[name].core.ssd_contents()) is not None:
            self._on_ssd[name] = left
        for table in (self.frontends, self.nodes, self.instances):
            process = table.pop(name, None)
            if process is not None:
                process.kill()

    def _new_epoch(self, name: str) -> int:
        epoch = self._lives[name] = self._lives.get(name, 0) + 1
        return epoch

    def _new_conductor(self) -> SimConductor:
        seed = self.rng.randrange(1 << 32)
        return SimConductor(self.config.conductor, seed, self.loop, self.network, self._observer)

    def _new_frontend(self, name: str) -> SimFrontend:
        config = self.config
        return SimFrontend(
            name, config.dispatcher, config.block_tokens, self.loop, self.network, self._observer, self._ended
        )

    def _new_node(self, name: str) -> SimNode:
        node = SimNode(
            name,
            self._new_epoch(name),
            self.config.node,
            self.loop,
            self.network,
            self._observer,
            self._chance,
            self._on_ssd.pop(name, None),
        )
        node.copier = SimCopier(node, self._connect)
        return node

    def _new_instance(self, name: str, role: Role, number: int) -> SimInstance:
        config = self.config
        at = number if role is Role.PREFILL else -1 - number
        node = self._node_of[name] = f"node-{at % config.nodes}"
        limits = config.limits

        def describe(role: Role) -> InstanceInfo:
            return InstanceInfo(
                name=name,
                epoch=self._new_epoch(name),
                role=role,
                address=f"sim:{name}",
                compat=_COMPAT,
                node=node,
                node_addresses=(f"sim:{node}",),
                num_pages=limits.num_pages,
                page_tokens=limits.page_tokens,
                max_batch=config.prefill_batch if role is Role.PREFILL else config.decode_batch,
                max_step_tokens=limits.max_step_tokens,
                cost=config.cost,
                shard=SHARD,
                kv_token_bytes=config.node.token_bytes,
            )

        engine = EngineConfig(config.cost, config.host_ns, config.one_step, config.engine_fault)
        return SimInstance(
            role,
            describe,
            InstanceConfig(limits, engine, part_tokens=config.dispatcher.part_tokens),
            self.loop,
            self.network,
            self._connect,
            self.model,
            self._observer,
            self._chance,
        )

    def _connect(self, node: str, client: str) -> NodeClient | None:
        """client: an instance, or another node."""
        found = self.nodes.get(node)
        if found is None or not self.network.reachable(node, client):
            return None
        return found.attach(client, self.nodes.get(self._node_of.get(client, client)))

    def _flush(self) -> None:
        """What instances have said by now, though the simulation has kept it back."""
        for instance in self.instances.values():
            instance.engine.flush()

    def cut(self, one: str, other: str, duration: int) -> None:
        """Nothing passes between the two for a while."""
        self._flush()
        self.network.cut(one, other, duration)

    def reset(self, one: str, other: str) -> None:
        """The stream between the two breaks and is made anew."""
        self._flush()
        self.network.reset(one, other)

    def slow(self, name: str, speed: float, duration: int) -> None:
        """That instance computes at a share of its speed for a while, as a GPU does that throttles. Others are left alone."""
        instance = self.instances.get(name)
        if instance is not None:
            instance.engine.set_speed(speed)
            self.loop.after(duration, instance.engine.set_speed, 1.0)

    def _cut(self, one: str, other: str) -> None:
        for name, node in ((one, other), (other, one)):
            if node in self.nodes and name in self.instances:
                self.instances[name].lose_node(node)
            elif node in self.nodes and name in self.nodes:
                self.nodes[name].copier.lose_node(node)

    def _chance(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share

    # ------------------------------------------------------------------ watching

    @property
    def _observer(self) -> Observer | None:
        return self._observe if self._watch is not None else None

    def _observe(self, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        if self._watch is not None:
            self._watch(self.loop.now, name, core, event, commands)

    def check_integrity(self) -> None:
        """The conservation laws of all cores."""
        if self.conductor is not None:
            self.conductor.core.check_integrity()
        for frontend in self.frontends.values():
            frontend.core.check_integrity()
        for node in self.nodes.values():
            node.core.check_integrity()
        for instance in self.instances.values():
            instance.core.check_integrity()
            instance.engine.core.check_integrity()

    def leftovers(self) -> dict[str, int]:
        """What is still held anywhere; empty when all requests have ended and everything was given back."""
        held: dict[str, int] = {}
        if self.conductor is not None:
            held["bookings"] = len(self.conductor.core.books.bookings)
        for name, node in self.nodes.items():
            metrics = node.core.metrics()
            held[f"{name} leases"] = metrics["leases"]
            held[f"{name} reservations"] = metrics["reservations"]
            held[f"{name} bytes"] = metrics["used_bytes"] - metrics["evictable_bytes"]
            if "ssd_used_bytes" in metrics:
                held[f"{name} ssd bytes"] = metrics["ssd_used_bytes"] - metrics["ssd_evictable_bytes"]
                held[f"{name} calls"] = metrics["waiting"] + metrics["ssd_jobs"]
        for name, instance in self.instances.items():
            pool = instance.engine.core.pool
            held[f"{name} attempts"] = instance.core.num_attempts
            held[f"{name} claims"] = instance.num_claims
            held[f"{name} pages"] = pool.num_pages - pool.num_free
            held[f"{name} sequences"] = int(not instance.engine.core.idle)
        for name, frontend in self.frontends.items():
            held[f"{name} requests"] = frontend.core.num_running
        return {what: count for what, count in held.items() if count}
