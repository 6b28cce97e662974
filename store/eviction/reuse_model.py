"""How soon objects are used again, learned from what was used and what was not.

The chance that an object of some class and age is used before it gets to the next age is taken to be a product, as in Cox's
model of proportional hazards (1972): one curve over age for all objects, times a factor of its first trait, times one of its
second. A product has few numbers to learn, so it soon knows them well; a curve for each class would be mostly noise.

From that follows what an object is worth: the most hits for each block and unit of time that keeping it for some time longer
can bring,

    density(age) = max over T of  P(used between age and T) / E[time until it is used or T is reached]

which is Gittins' index (1979) of the choice when to give it up. A plain hazard would drop a conversation while its user thinks;
this looks ahead to the time when the answer is due. LHD, least hit density (Beckmann, Chen, Cidon, NSDI 2018), orders objects
by a like quantity, with the time that its policy happens to keep them for T.

Ages are counted in objects that went idle, since a policy has no clock. A bucket is half an octave of them.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

BUCKETS_PER_OCTAVE = 2
NUM_BUCKETS = 2 * 64
"""More than any store lives to see."""
HALF_LIFE = 4
"""What was seen counts half after so many times the number of objects that are here went idle. Shorter forgets what is still
true, longer learns late that times have changed."""
REFITS = 8
"""While as many objects as there are here go idle: often enough to tell ages near that apart. One takes 1 ms."""
OBJECTS_MIN = 4096
"""A smaller store learns as slowly as one of so many objects: it needs to see as many prompts, two hundred or so."""
HISTORY_MAX = 64 * REFITS
"""Refits whose times are known: what is older than those is taken to be as old as the first of them."""
PRIOR_CHANCE = 0.02
"""Of a use in each bucket, before anything was seen. Equal in all of them it makes the density fall with age, which is LRU."""
PRIOR_BLOCKS = 100
"""What has been seen of so few blocks, a handful of prompts, counts as much as what was supposed before."""
_CHANCE_MAX = 0.99

_KEEP = 0.5 ** (1 / (REFITS * HALF_LIFE))
_EDGES = 2.0 ** (np.arange(NUM_BUCKETS + 1) / BUCKETS_PER_OCTAVE) - 1
_WIDTHS = np.diff(_EDGES)


def bucket_of(age: int) -> int:
    return int(BUCKETS_PER_OCTAVE * math.log2(age + 1))


class ReuseModel:
    """Classes are pairs of two traits, numbered `first * num_second + second`. _uses, _reached: decayed sums by traits and
    bucket, of uses and of objects that got as old as that."""

    def __init__(self, num_first: int, num_second: int) -> None:
        self._densities: list[list[float]] = []
        self._shape = num_first, num_second, NUM_BUCKETS
        self._born = [0] * (num_first * num_second)
        self._used = np.zeros((num_first * num_second, NUM_BUCKETS))
        self._uses = np.zeros(self._shape)
        self._reached = np.zeros(self._shape)
        self._first = np.ones(num_first)
        self._second = np.ones(num_second)
        self._history = deque([(0, np.zeros(self._shape[:2]))], maxlen=HISTORY_MAX)
        """(time, how many were born until then), the oldest first."""
        self._counted = np.zeros(self._shape)
        """How many, of those born so far, count as having reached each bucket."""
        self._refit_at = 0
        self.refit(0, 0)

    def born(self, kind: int, count: int) -> None:
        """Objects of a class became candidates."""
        self._born[kind] += count

    def used(self, kind: int, age: int, count: int) -> None:
        """Such objects were wanted, whether they were still here or not."""
        self._used[kind, bucket_of(age)] += count

    def density(self, kind: int, age: int) -> float:
        """Uses for each object and unit of age that keeping one of that class and age can bring."""
        return self._densities[kind][bucket_of(age)]

    def refit(self, now: int, num_objects: int) -> None:
        """To be called when objects went idle; learns from time to time."""
        if now < self._refit_at:
            return
        self._refit_at = now + max(num_objects, OBJECTS_MIN) // REFITS
        num_buckets = bucket_of(self._refit_at) + 1  # nothing will be older until then
        self._count(now, num_buckets)
        curve, at_risk = self._fit_curve(num_buckets)
        self._fit_factors(curve * at_risk)
        self._densities = self._look_ahead(curve)

    def _count(self, now: int, num_buckets: int) -> None:
        """Uses, and as many objects as got to each age since last time. An object that is not that old yet is not counted as
        unused: that would take young times for bad ones."""
        self._uses = _KEEP * self._uses + self._used.reshape(self._shape)
        self._used = np.zeros_like(self._used)
        self._history.append((now, np.array(self._born, dtype=float).reshape(self._shape[:2])))
        counted = self._born_until(now - _EDGES[:num_buckets])
        self._reached *= _KEEP
        self._reached[..., :num_buckets] += counted - self._counted[..., :num_buckets]
        self._counted[..., :num_buckets] = counted

    def _born_until(self, times: np.ndarray) -> np.ndarray:
        known = np.array([time for time, _ in self._history])
        at = np.maximum(0, np.searchsorted(known, times, side="right") - 1)
        return np.stack([self._history[index][1] for index in at.tolist()], axis=-1)

    def _fit_curve(self, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
        """Chance of a use in each bucket for those who get there, by the factors so far, and how many got there."""
        uses = self._uses[..., :num_buckets]
        before = np.cumsum(uses, axis=-1) - uses
        at_risk = np.maximum(self._reached[..., :num_buckets] - before, uses)
        expected = np.einsum("i,j,ijb->b", self._first, self._second, at_risk)
        curve = (uses.sum((0, 1)) + PRIOR_BLOCKS * PRIOR_CHANCE) / (expected + PRIOR_BLOCKS)
        return curve, at_risk

    def _fit_factors(self, expected: np.ndarray) -> None:
        """expected: uses by traits and bucket if all factors were 1. One step of each in turn; the next refit goes on."""
        uses, each = self._uses.sum(-1), expected.sum(-1)
        self._first = (uses.sum(1) + PRIOR_BLOCKS) / (each @ self._second + PRIOR_BLOCKS)
        self._second = (uses.sum(0) + PRIOR_BLOCKS) / (self._first @ each + PRIOR_BLOCKS)

    def _look_ahead(self, curve: np.ndarray) -> list[list[float]]:
        factors = np.outer(self._first, self._second).reshape(-1, 1)
        chance = np.minimum(factors * curve, _CHANCE_MAX)
        alive = np.cumprod(1 - chance, axis=-1) / (1 - chance)
        hits = np.cumsum(alive * chance, axis=-1)
        time = np.cumsum(alive * (1 - chance / 2) * _WIDTHS[: len(curve)], axis=-1)
        zero = np.zeros((len(factors), 1))
        hits_before, time_before = np.hstack((zero, hits[:, :-1])), np.hstack((zero, time[:, :-1]))
        gained, spent = hits[:, None] - hits_before[..., None], time[:, None] - time_before[..., None]
        ratios = np.divide(gained, spent, out=np.zeros_like(gained), where=spent > 0)
        found: list[list[float]] = ratios.max(-1).tolist()
        return found
