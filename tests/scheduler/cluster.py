"""A small cluster around one Conductor core: short names, exact times."""

from __future__ import annotations

import random
from typing import Any

from mooncake.core.messages import (
    AttemptEnded,
    CacheDelta,
    CacheSnapshot,
    Message,
    NodeInfo,
    Placed,
    PlaceRequest,
    Register,
    RegisterNode,
    Rejected,
    Send,
)
from mooncake.core.types import AttemptKey, CostModel, InstanceInfo, InstanceLoad, Role
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.core import ConductorCore, PeerGone, Received, Tick

MS = 1_000_000
S = 1_000_000_000
COST = CostModel(prefill=(1.0, 100.0, 0.0), decode=(10.0, 1.0, 0.0))
"""Prefill: 1 ms + 0.1 ms a token. Decode: 10 ms + 1 ms a sequence."""
BLOCK = 4


def blocks(*numbers: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(16, "big") for number in numbers)


def info(name: str, role: Role, **changes: Any) -> InstanceInfo:
    fields: dict[str, Any] = {
        "name": name,
        "epoch": 1,
        "role": role,
        "address": f"{name}:1",
        "compat": "c",
        "node": "",
        "node_addresses": (),
        "num_pages": 1000,
        "page_tokens": 4,
        "max_batch": 8,
        "max_step_tokens": 4096,
        "cost": COST,
    }
    return InstanceInfo(**(fields | changes))


def load(name: str, seq: int, **changes: Any) -> InstanceLoad:
    fields: dict[str, Any] = {
        "name": name,
        "epoch": 1,
        "seq": seq,
        "num_waiting": 0,
        "waiting_tokens": 0,
        "num_running": 0,
        "context_tokens": 0,
        "free_pages": 1000,
        "step_ns": 0,
    }
    return InstanceLoad(**(fields | changes))


class Cluster:
    """Drives a core; every event is followed by the conservation checks."""

    def __init__(self, **config: Any) -> None:
        settings: dict[str, Any] = {"block_tokens": BLOCK, "kv_token_bytes": 1000, "policy": "algorithm1"}
        self.core = ConductorCore(ConductorConfig(**(settings | config)), random.Random(7))
        self.now = 0

    def event(self, event: Received | PeerGone | Tick) -> list[Send]:
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        return commands

    def receive(self, sender: str, message: Message) -> list[Send]:
        return self.event(Received(sender, message))

    def instance(self, name: str, role: Role, **changes: Any) -> list[Send]:
        return self.receive(name, Register(info(name, role, **changes)))

    def prefill(self, name: str, **changes: Any) -> list[Send]:
        return self.instance(name, Role.PREFILL, **changes)

    def decode(self, name: str, **changes: Any) -> list[Send]:
        return self.instance(name, Role.DECODE, **changes)

    def node(self, name: str, *numbers: int, epoch: int = 1) -> list[Send]:
        """A store node that holds these blocks in DRAM."""
        commands = self.receive(
            name, RegisterNode(NodeInfo(name=name, epoch=epoch, addresses=(f"unix:{name}",), capacity_bytes=1))
        )
        self.receive(name, CacheSnapshot(name, epoch, 0, "dram", blocks(*numbers)))
        return commands

    def delta(
        self, holder: str, seq: int, tier: str, added: tuple[int, ...] = (), removed: tuple[int, ...] = ()
    ) -> list[Send]:
        return self.receive(holder, CacheDelta(holder, 1, seq, tier, blocks(*added), blocks(*removed)))

    def ask(self, request: int, num_tokens: int = 10, *numbers: int, **changes: Any) -> list[Send]:
        fields: dict[str, Any] = {
            "key": AttemptKey("f", request),
            "num_tokens": num_tokens,
            "block_keys": blocks(*numbers),
            "max_tokens": 10,
        }
        return self.receive("f", PlaceRequest(**(fields | changes)))

    def answer(self, request: int, num_tokens: int = 10, *numbers: int, **changes: Any) -> Placed | Rejected:
        (answer,) = answers(self.ask(request, num_tokens, *numbers, **changes))
        return answer

    def place(self, request: int, num_tokens: int = 10, *numbers: int, **changes: Any) -> Placed:
        answer = self.answer(request, num_tokens, *numbers, **changes)
        assert isinstance(answer, Placed), answer
        return answer

    def end(self, request: int, **changes: Any) -> list[Send]:
        return self.receive("f", AttemptEnded(AttemptKey("f", request), **changes))

    def booked(self) -> dict[str, tuple[int, int]]:
        """By instance: booked prefills and decodes."""
        instances = self.core.view.instances.items()
        return {name: (instance.num_prefills, instance.num_decodes) for name, instance in instances}

    def pending(self, name: str) -> tuple[int, int, int]:
        """Booked there and in no load report yet: sequences, their tokens and pages."""
        pending = self.core.view.instances[name].pending
        return len(pending), sum(each.num_tokens for each in pending), sum(each.num_pages for each in pending)


def answers(commands: list[Send]) -> list[Placed | Rejected]:
    return [command.message for command in commands if isinstance(command.message, Placed | Rejected)]


def messages(commands: list[Send], kind: type) -> list[tuple[str, Message]]:
    return [(command.to, command.message) for command in commands if type(command.message) is kind]
