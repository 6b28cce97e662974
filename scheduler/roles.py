"""Which pool an instance should serve in: the decision to switch one, with hysteresis. To carry it out is not this
file's work (`switching`): the instance drains, leaves, and joins again in its new role.

*Pressure* of a pool is its load by what it may bear, 1 being the limit. A switch is decided when one pool has been
under high pressure, and the other under so little that it can spare an instance, for several samples in a row. Then
nothing is decided until the instance is seen in its new role or has had time enough; and with each switch back the
patience doubles, so that a load that swings is not followed for long. Only after a long calm it is as at the
beginning.

A pool that is empty gets an instance of the other one, whatever the pressure: whoever dies comes back in the role that it
was started in, so a pool of switched instances may be left without any.
"""

from __future__ import annotations

import msgspec

from mooncake.core.types import Role
from mooncake.scheduler.config import RolesConfig
from mooncake.scheduler.pools import Instance
from mooncake.scheduler.view import View


class SwitchRole(msgspec.Struct, frozen=True):
    name: str
    role: Role


class Sample(msgspec.Struct, frozen=True):
    """Pressure of both pools, and for each its members, the least loaded first. attained: share of requests that met
    their objective for the first token, and for gaps, lately; 1 if there was none."""

    prefill: float
    decode: float
    prefill_names: tuple[str, ...]
    decode_names: tuple[str, ...]
    attained_ttft: float = 1.0
    attained_tbt: float = 1.0


class Roles:
    """Sans-IO: `observe(sample, now)` at regular intervals."""

    def __init__(self, config: RolesConfig) -> None:
        self._config = config
        self._streak = 0
        """Samples in a row that ask for more prefill instances, or (negative) for more decode instances."""
        self._patience = config.num_samples
        self._switching: SwitchRole | None = None
        self._switched_at: int | None = None
        self._last: Role | None = None
        self._wanted_at = 0
        self._had_both = False
        """Whether there was an instance of either role. Until then the cluster is just being started."""

    def observe(self, sample: Sample, now: int) -> SwitchRole | None:
        self._had_both = self._had_both or bool(sample.prefill_names and sample.decode_names)
        if self._is_settling(sample, now):
            self._streak = 0
            return None
        wanted = self._wanted(sample)
        if wanted is None:
            self._streak = 0
            self._forgive(now)
            return None
        self._wanted_at = now
        step = 1 if wanted is Role.PREFILL else -1
        self._streak = self._streak + step if step * self._streak > 0 else step
        if abs(self._streak) < self._patience:
            return None
        names = sample.decode_names if wanted is Role.PREFILL else sample.prefill_names
        return self._switch(names[0], wanted, now)

    def _switch(self, name: str, role: Role, now: int) -> SwitchRole:
        if self._last is not None and self._last is not role:
            self._patience = min(2 * self._patience, self._config.num_samples_max)
        self._last, self._switched_at, self._streak = role, now, 0
        self._switching = SwitchRole(name, role)
        return self._switching

    def _is_settling(self, sample: Sample, now: int) -> bool:
        """Whether the last switch is under way, or so young that its effect cannot be seen. Who is ready, in whatever role, has
        switched, or died and came back, or never heard of it."""
        if self._switched_at is None:
            return False
        since = now - self._switched_at
        switching = self._switching
        if switching is not None:
            is_ready = switching.name in sample.prefill_names or switching.name in sample.decode_names
            if not is_ready and since < self._config.drain_ns:
                return True
            self._switching = None
            self._switched_at = now
            return True
        return since < self._config.rest_ns

    def _forgive(self, now: int) -> None:
        if now - self._wanted_at > self._config.forgive_ns:
            self._patience, self._last = self._config.num_samples, None

    def _wanted(self, sample: Sample) -> Role | None:
        config, num_prefill, num_decode = self._config, len(sample.prefill_names), len(sample.decode_names)
        if not num_prefill or not num_decode:
            spares = max(num_prefill, num_decode) > 1 and self._had_both
            return (Role.DECODE if num_prefill else Role.PREFILL) if spares else None
        prefill = max(sample.prefill, _missed(sample.attained_ttft, config.attained_min))
        decode = max(sample.decode, _missed(sample.attained_tbt, config.attained_min))
        if prefill >= config.pressure_high and _spares(decode, num_decode, config.num_decode_min, config):
            return Role.PREFILL
        if decode >= config.pressure_high and _spares(prefill, num_prefill, config.num_prefill_min, config):
            return Role.DECODE
        return None


def _spares(pressure: float, count: int, count_min: int, config: RolesConfig) -> bool:
    """Whether a pool can do with one instance less."""
    return count > max(1, count_min) and pressure * count / (count - 1) <= config.pressure_spare


def _missed(attained: float, least: float) -> float:
    """Too few objectives met is pressure at the limit, whatever the load looks like."""
    return 1.0 if attained < least else 0.0


def take_sample(view: View, config: RolesConfig, attained_ttft: float, attained_tbt: float, now: int) -> Sample | None:
    """Of the pools as they are; None without anybody in them, or if colocated instances do what one of them should."""
    prefill, decode = view.pools
    members = [member for member in decode.members if not member.prefills_in_place]
    if not (len(prefill) and members) and (decode.num_colocated or not (len(prefill) or members)):
        return None
    waits = [max(0, member.busy_until - now) for member in prefill.members]
    loads = [_decode_pressure(member, config) for member in members]
    return Sample(
        sum(waits) / max(1, len(waits)) / config.ttft_ns,
        sum(loads) / max(1, len(loads)),
        _by_load(prefill.members, waits),
        _by_load(members, loads),
        attained_ttft,
        attained_tbt,
    )


def _decode_pressure(member: Instance, config: RolesConfig) -> float:
    """The tightest of batch, pages and step, with what is booked and no report shows yet. What still waits to be prefilled
    is the other pool's load: the longer that queue, the less it says of how many will decode at a time."""
    info = member.info
    pending = [booking for booking in member.pending if booking.submitted_at is not None]
    num_pages = sum(booking.num_pages for booking in pending)
    step = member.decode[0] + member.batch_ns + sum(booking.sequence_ns for booking in pending)
    return max(
        (member.num_seqs + len(pending)) / max(1, info.max_batch),
        (member.used_pages + num_pages) / max(1, info.num_pages),
        step / config.tbt_ns,
    )


def _by_load(members: tuple[Instance, ...] | list[Instance], loads: list[int] | list[float]) -> tuple[str, ...]:
    order = sorted(range(len(members)), key=lambda row: (loads[row], row))
    return tuple(members[row].info.name for row in order)
