"""Random clusters against the core: joins, losses, stale epochs, repeated messages. A failure report is a seed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from typing import get_args

import msgspec
import pytest

from mooncake.core.messages import (
    AttemptEnded,
    BookingSnapshot,
    CacheDelta,
    CacheSnapshot,
    LoadReport,
    Message,
    NodeInfo,
    Placed,
    PlaceRequest,
    PrefillDone,
    Register,
    Registered,
    RegisterNode,
    Rejected,
    Send,
    StateChange,
)
from mooncake.core.types import AttemptKey, InstanceState, Role, Slo
from mooncake.scheduler.config import (
    AdmissionRule,
    Calibration,
    ConductorConfig,
    Fairness,
    PolicyName,
    ReplicationConfig,
)
from mooncake.scheduler.core import ConductorCore, PeerGone, Received, Tick
from tests.scheduler.cluster import COST, MS, S, blocks, info, load

ROLES = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "c0": Role.COLOCATED}
NODES = ("n0", "n1")
FRONTENDS = ("f0", "f1")


class Life:
    """What the world knows of an instance: the last registration that was accepted, and what happened since."""

    def __init__(self, epoch: int, state: InstanceState) -> None:
        self.epoch = epoch
        self.state = state
        self.connected = True


class World:
    def __init__(self, seed: int, policy: PolicyName | None = None) -> None:
        self.rng = random.Random(seed)
        config = ConductorConfig(
            block_tokens=4,
            policy=policy or self.rng.choice(get_args(PolicyName)),
            admission=self.rng.choice(["off", "soft", "hard"]),
            admission_rule=self.rng.choice(get_args(AdmissionRule)),
            fairness=Fairness(half_life_ns=5 * S, num_tenants_max=2),
            replicate=self.rng.random() < 0.5,
            replication=ReplicationConfig(num_uses_min=2, num_blocks_min=1, wait_ns=0, num_prefixes_max=4),
            calibration=Calibration(num_outcomes_min=2, relative_error_max=1e9),
            num_waiting_max=4,
            num_records_max=8,
            index_blocks_max=40,
        )
        self.core = ConductorCore(config, random.Random(seed))
        self.now = 0
        self.lives: dict[str, Life] = {}
        self.asked: dict[AttemptKey, PlaceRequest] = {}
        self.answers: dict[AttemptKey, tuple[Placed | Rejected, int]] = {}
        """And until when a rejection holds."""
        self.open: dict[AttemptKey, Placed] = {}
        self.lost_frontends: dict[str, int] = {}
        self.sequence = 0

    # ------------------------------------------------------------ driving

    def run(self, num_events: int) -> None:
        actions = (
            [self.place] * 8
            + [self.repeat] * 2
            + [self.prefill_done, self.end] * 3
            + [self.register] * 3
            + [self.change_state, self.report, self.register_node, self.lose, self.book_snapshot]
            + [self.cache_delta, self.cache_snapshot] * 2
        )
        for _ in range(num_events):
            self.now += self.rng.choice([0, 1, 10 * MS, 1 * S])
            for frontend in [name for name, gone_at in self.lost_frontends.items() if gone_at <= self.now]:
                self.bury(frontend)
            self.rng.choice(actions)()
            due = self.core.deadline()
            if due is not None and due <= self.now:
                self.event(Tick())
        self.settle()

    def settle(self) -> None:
        for key, request in [*self.asked.items()]:
            for choice in range(request.num_choices):
                self.receive(key.frontend, AttemptEnded(key.of_choice(choice)))
        self.lost_frontends.clear()
        self.now += 3600 * S
        self.event(Tick())
        assert self.answers.keys() == self.asked.keys()
        assert not self.core.books.bookings
        for instance in self.core.view.instances.values():
            assert not (instance.num_prefills or instance.num_decodes or instance.prefill_ns or instance.pending)

    def receive(self, sender: str, message: Message) -> list[Send]:
        return self.event(Received(sender, message))

    def event(self, event: Received | PeerGone | Tick) -> list[Send]:
        if isinstance(event, Received):
            self.lost_frontends.pop(event.sender, None)
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        for command in commands:
            if isinstance(command.message, Placed | Rejected):
                self.answered(command)
        return commands

    def bury(self, frontend: str) -> None:
        """A frontend lost for so long is dead, and its requests with it."""
        del self.lost_frontends[frontend]
        for table in (self.asked, self.answers, self.open):
            for key in [key for key in table if key.frontend == frontend]:
                del table[key]

    def answered(self, command: Send) -> None:
        answer = command.message
        assert isinstance(answer, Placed | Rejected) and command.to == answer.key.frontend
        before, until = self.answers.get(answer.key, (None, 0))
        if before is not None and (isinstance(before, Placed) or self.now < until):
            assert before == answer, "two different answers"
            return
        retry_ns = answer.retry_after_ns if isinstance(answer, Rejected) else 0
        self.answers[answer.key] = answer, self.now + retry_ns
        if isinstance(answer, Rejected):
            return
        for choice in range(answer.num_choices):
            self.open[answer.key.of_choice(choice)] = answer
        self.check_instances(answer, self.asked[answer.key].exclude)
        if answer.source is not None:
            assert answer.source.num_tokens < self.asked[answer.key].num_tokens and answer.source.addresses

    def check_instances(self, answer: Placed, exclude: tuple[str, ...]) -> None:
        """All are ready, and excluded only if every other one is not."""
        ready = [name for name, life in self.lives.items() if life.connected and life.state is InstanceState.READY]
        decoding = [name for name in ready if ROLES[name] is not Role.PREFILL]
        prefilling = [name for name in ready if ROLES[name] is Role.PREFILL]
        assert answer.decode in decoding, f"placed on {answer.decode}"
        if answer.prefill:
            assert answer.prefill in prefilling, f"placed on {answer.prefill}"
            assert answer.prefill not in exclude or all(name in exclude for name in prefilling)
        elif not self.asked[answer.key].decode_only and not prefilling:
            decoding = [name for name in decoding if ROLES[name] is Role.COLOCATED]
        assert answer.decode not in exclude or all(name in exclude for name in decoding)

    # ------------------------------------------------------------ events

    def place(self) -> None:
        self.sequence += 1
        frontend = self.rng.choice(FRONTENDS)
        start = self.rng.randrange(5)
        num_blocks = self.rng.randrange(12)
        request = PlaceRequest(
            key=AttemptKey(frontend, self.sequence),
            num_tokens=self.rng.choice([4 * num_blocks + 1, 4 * num_blocks + 4, 5000]),
            block_keys=blocks(*range(start, start + num_blocks)),
            max_tokens=self.rng.choice([None, 1, 100]),
            slo=self.rng.choice([Slo(), Slo(ttft_ns=1), Slo(tbt_ns=12 * MS)]),
            exclude=self.rng.choice([(), ("p0",), ("d0", "gone"), tuple(ROLES)]),
            decode_only=self.rng.random() < 0.2,
            first=self.rng.random() < 0.7,
            num_choices=self.rng.choice([1, 1, 3]),
            tenant=self.rng.choice("abc"),
            priority=self.rng.choice([0, 0, 1, -2]),
        )
        self.asked[request.key] = request
        self.receive(frontend, request)

    def repeat(self) -> None:
        if self.asked:
            key = self.rng.choice([*self.asked][-20:])
            self.receive(key.frontend, self.asked[key])

    def prefill_done(self) -> None:
        if self.open:
            key = self.rng.choice([*self.open])
            self.receive(key.frontend, PrefillDone(key, self.rng.choice([None, 5 * MS])))

    def end(self) -> None:
        if self.asked and self.rng.random() < 0.2:
            key = self.rng.choice([*self.asked])
        elif self.open:
            key = self.rng.choice([*self.open])
        else:
            return
        self.open.pop(key, None)
        self.receive(key.frontend, AttemptEnded(key, 5, True, 12 * MS))

    def register(self) -> None:
        name = self.rng.choice([*ROLES])
        life = self.lives.get(name)
        epoch = (life.epoch if life is not None else 1) + self.rng.choice([-1, 0, 0, 1])
        state = self.rng.choice([InstanceState.READY] * 3 + [InstanceState.STARTING, InstanceState.DRAINING])
        message = Register(
            info(
                name, ROLES[name], epoch=epoch, state=state, node=self.rng.choice(NODES), compat=self.rng.choice("cccd")
            )
        )
        # Accepting one may refuse others that came before, so the world believes the replies.
        before = self.lives.get(name)
        self.lives[name] = Life(epoch, state)
        for command in self.receive(name, message):
            if isinstance(command.message, Registered) and not command.message.accepted:
                self.refused(command.to, name, before)

    def refused(self, name: str, sender: str, before: Life | None) -> None:
        if name == sender and before is not None and name in self.core.view.instances:
            self.lives[name] = before
        else:
            self.lives.pop(name, None)

    def change_state(self) -> None:
        if not self.lives:
            return
        name = self.rng.choice([*self.lives])
        life = self.lives[name]
        epoch = life.epoch - (self.rng.random() < 0.2)
        state = self.rng.choice([*InstanceState, InstanceState.READY])
        if epoch == life.epoch:
            life.state = state
            if state is InstanceState.GONE:
                del self.lives[name]
        for command in self.receive(name, StateChange(name, epoch, state, COST)):
            if isinstance(command.message, Registered):
                self.lives.pop(command.to, None)

    def lose(self) -> None:
        name = self.rng.choice([*ROLES, *NODES, *FRONTENDS])
        if name in self.lives:
            self.lives[name].connected = False
        if name in FRONTENDS:
            self.lost_frontends[name] = self.now + self.core.config.peer_grace_ns
        self.event(PeerGone(name))

    def report(self) -> None:
        name = self.rng.choice([*ROLES])
        self.sequence += 1
        numbers = {
            field: self.rng.randrange(20) for field in ("num_waiting", "waiting_tokens", "num_running", "free_pages")
        }
        seq = self.sequence - self.rng.choice([0, 0, 50])
        self.receive(name, LoadReport(load(name, seq, epoch=self.rng.choice([1, 2]), **numbers)))

    def register_node(self) -> None:
        name = self.rng.choice(NODES)
        node = NodeInfo(name, self.rng.randrange(3), (f"unix:{name}",), 1)
        self.receive(name, RegisterNode(node))

    def cache_delta(self) -> None:
        holder, epoch, tier = self.holder()
        self.sequence += 1
        added, removed = self.keys(), self.keys()
        seq = self.rng.randrange(8)
        self.receive(holder, CacheDelta(holder, epoch, seq, tier, added, removed))

    def cache_snapshot(self) -> None:
        holder, epoch, tier = self.holder()
        self.receive(holder, CacheSnapshot(holder, epoch, self.rng.randrange(8), tier, self.keys()))

    def holder(self) -> tuple[str, int, str]:
        name = self.rng.choice([*ROLES, *NODES])
        tier = self.rng.choice(["dram", "ssd"]) if name in NODES else "hbm"
        return name, self.rng.randrange(3), tier

    def keys(self) -> tuple[bytes, ...]:
        start = self.rng.randrange(16)
        return blocks(*range(start, start + self.rng.randrange(10)))

    def book_snapshot(self) -> None:
        """A true snapshot of one frontend: it may be late, but names no attempt that has ended."""
        frontend = self.rng.choice(FRONTENDS)
        rows = tuple(
            (key, placed.prefill if not key.choice and self.rng.random() < 0.5 else "", placed.decode, num_tokens)
            for key, placed in self.open.items()
            for num_tokens in [self.asked[placed.key].num_tokens]
            if key.frontend == frontend
        )
        self.receive(frontend, BookingSnapshot(frontend, rows))


@pytest.mark.parametrize("seed", range(60))
def test_random_cluster(seed: int) -> None:
    World(seed).run(400)


def digest(seed: int, policy: PolicyName) -> str:
    """Of all commands of a world, in their order."""
    world = World(seed, policy)
    found = hashlib.sha256()
    plain = world.event

    def logged(event: Received | PeerGone | Tick) -> list[Send]:
        result = plain(event)
        found.update(msgspec.msgpack.encode([(command.to, command.message) for command in result]))
        return result

    world.event = logged  # type: ignore[method-assign]
    world.run(300)
    return found.hexdigest()


def test_same_seed_same_commands_whatever_python_hashes() -> None:
    code = (
        "from tests.scheduler.test_conductor_random import PolicyName, digest, get_args\n"
        "print([digest(seed, policy) for policy in get_args(PolicyName) for seed in (11, 12)])"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([".", *sys.path[1:]])},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "1234")
    ]
    assert found[0] == found[1] and len(found[0]) > 12 * 64
