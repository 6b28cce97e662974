"""`Roles` in action: at regular intervals it is shown the pools and what was attained, and what it decides is sent to the
instance, which drains, and registers again in its new role.

What was attained is known from what frontends tell anyway: the time to the first token, from the placement on, when it is
there; the mean gap when the attempt ends. It counts for requests that have such an objective. A refusal by a prediction is an
objective missed, as the pool that would have met it is too small.
"""

from __future__ import annotations

from mooncake.core.messages import ChangeRole, Rejected, Send
from mooncake.core.types import Slo
from mooncake.scheduler.admission.gate import OVERLOADED_TBT, OVERLOADED_TTFT
from mooncake.scheduler.config import ConductorConfig, RolesConfig
from mooncake.scheduler.roles import Roles, take_sample
from mooncake.scheduler.view import View

_NUM_OUTCOMES_MIN = 10.0
"""Fewer are an accident."""


class _Attained:
    """Outcomes count half as much with each sample that has passed since."""

    def __init__(self) -> None:
        self._num_met = 0.0
        self._num_outcomes = 0.0

    def note(self, *, met: bool) -> None:
        self._num_met += met
        self._num_outcomes += 1

    def age(self) -> None:
        self._num_met /= 2
        self._num_outcomes /= 2

    @property
    def share(self) -> float:
        return self._num_met / self._num_outcomes if self._num_outcomes >= _NUM_OUTCOMES_MIN else 1.0


class NoSwitching:
    """Every instance keeps its role."""

    due: int | None = None

    def begin(self, now: int) -> None:
        pass

    def sample(self, now: int) -> list[Send]:
        return []

    def note_ttft(self, slo: Slo, ttft_ns: int) -> None:
        pass

    def note_tbt(self, slo: Slo, mean_itl_ns: int) -> None:
        pass

    def note_refusal(self, message: Rejected) -> None:
        pass


class Switching:
    """due: when the next sample is to be taken, after `begin`."""

    def __init__(self, config: RolesConfig, view: View) -> None:
        self.due: int | None = None
        self._config = config
        self._view = view
        self._roles = Roles(config)
        self._ttft = _Attained()
        self._tbt = _Attained()

    def begin(self, now: int) -> None:
        if self.due is None:
            self.due = now + self._config.sample_ns

    def sample(self, now: int) -> list[Send]:
        self.due = now + self._config.sample_ns
        sample = take_sample(self._view, self._config, self._ttft.share, self._tbt.share, now)
        self._ttft.age()
        self._tbt.age()
        decided = self._roles.observe(sample, now) if sample is not None else None
        if decided is None:
            return []
        epoch = self._view.instances[decided.name].info.epoch
        return [Send(decided.name, ChangeRole(decided.name, epoch, decided.role))]

    def note_ttft(self, slo: Slo, ttft_ns: int) -> None:
        if slo.ttft_ns is not None:
            self._ttft.note(met=ttft_ns <= slo.ttft_ns)

    def note_tbt(self, slo: Slo, mean_itl_ns: int) -> None:
        """The objective is for the longest gaps; where even the mean breaks it, it is missed for sure."""
        if slo.tbt_ns is not None:
            self._tbt.note(met=mean_itl_ns <= slo.tbt_ns)

    def note_refusal(self, message: Rejected) -> None:
        if message.reason == OVERLOADED_TTFT:
            self._ttft.note(met=False)
        elif message.reason == OVERLOADED_TBT:
            self._tbt.note(met=False)


def make_switching(config: ConductorConfig, view: View) -> Switching | NoSwitching:
    return Switching(config.roles, view) if config.switch_roles else NoSwitching()
