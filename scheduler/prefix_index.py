"""Which holder has which block: one dict from block key to a bit mask, so that one walk along a request's keys gives
the match length of every holder at once.

A holder (an instance's pages, or a store node) owns a slot, and a slot owns four adjacent bits of every mask. Three of
them are nested, each a superset of the one before, so that the same walk gives three match lengths per holder:

    level FAST      in the holder's fast tier (hbm of an instance, dram of a node)
    level ANY       in any of its tiers (fast or ssd)
    level EXPECTED  there, or expected to be there when a request placed now would need it
    SLOW            in its slow tier: no level, but what is left when the fast tier lets the block go

    slot:      ... |     2     |     1     |     0     |      slot 0 belongs to nobody: its bits are always zero
    mask bits: ... | S E A F   | S E A F   | - - - -   |      fast 0111, ssd 1110, both 1111, predicted only 0100

Confirmed entries come and go by the holder's reports and are never guessed away; predicted ones expire. Keys are opaque
bytes: a hand-over's partial key is never asked for, so it matches nothing.

The masks say everything: of a holder only the number of its entries is kept beside them, and the keys of its
predictions until these are confirmed or expire. Blocks of one sequence mostly have the same holders, so their masks
are one object, and all work is done by runs of equal masks: a block costs its key, one entry of the dict, and no
object of its own.

What no count can tell is found by *sweeps* over all keys, in bounded slices: of a removed holder, whose bits are
hidden at once and whose slot is given out again only when no mask has them any more; and of a snapshot, for entries
that it does not confirm (at once, if one slice reaches that far).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import groupby

import numpy as np

FAST, ANY, EXPECTED = 0, 1, 2
LEVELS = 3
SLOT_BITS = 4

IN_FAST, IN_SLOW = 0b0111, 0b1110
"""Bits of a confirmed entry by tier."""

_CONFIRMED = 1 << ANY
_PREDICTED = 1 << EXPECTED
_ALL = 0b1111
_LEVEL_BITS = 0b0111
_MARK = {IN_FAST: 0b0001, IN_SLOW: 0b1000}
"""The bit that says whether an entry is in that tier."""
_LEAVE = {
    IN_FAST: tuple(bits if not bits & 0b0001 else IN_SLOW if bits & 0b1000 else 0 for bits in range(16)),
    IN_SLOW: tuple(bits if not bits & 0b1000 else IN_FAST if bits & 0b0001 else 0 for bits in range(16)),
}
"""By tier and by bits of an entry: its bits when it has left that tier."""
_EXPIRE = tuple(0 if bits == _PREDICTED else bits for bits in range(16))
_NOTHING = (0,) * 16

SWEEP_BLOCKS = 20_000
"""Blocks looked at per sweep: a few ms."""
_SHARED_MAX = 8_192
"""Masks that are kept to be shared; more are begun anew, which costs memory only where every block differs."""


class Match:
    """Result of one walk: `steps` are (length, mask of the level bits whose runs are at least that long), lengths
    ascending, each mask a part of the one before. any_slow: whether slow tiers play a part at all."""

    __slots__ = ("any_slow", "steps", "width")

    def __init__(self, steps: list[tuple[int, int]], width: int, any_slow: bool) -> None:
        self.steps = steps
        self.width = width
        self.any_slow = any_slow

    @property
    def lengths(self) -> np.ndarray:
        """All match lengths in blocks, int64 of shape (levels, slots); for people and tests."""
        found = np.zeros(self.width * SLOT_BITS, dtype=np.int64)
        for length, mask in self.steps:
            found[bit_numbers(mask)] = length
        return found.reshape(self.width, SLOT_BITS).T[:LEVELS]

    def reach(self, bits: tuple[int, int, int]) -> tuple[int, int, int]:
        """How far each of three bits runs; of an instance and its node (`reach_bits`): leading blocks in its pages now,
        there when it is asked for them, and at the node in any tier."""
        first, second, third = bits
        own = expected = stored = 0
        for length, mask in self.steps:
            if mask & first:
                own = length
            if mask & second:
                expected = length
            if mask & third:
                stored = length
        return own, expected, stored

    def length(self, slot: int, level: int) -> int:
        """Leading blocks of that holder."""
        bit = level_bit(slot, level)
        return next((length for length, mask in reversed(self.steps) if mask & bit), 0)

    def longest(self, bits: int) -> tuple[int, int]:
        """The longest run among these bits, and those of them that have it; 0, 0 without any."""
        for length, mask in reversed(self.steps):
            if mask & bits:
                return length, mask & bits
        return 0, 0


def level_bit(slot: int, level: int) -> int:
    return 1 << SLOT_BITS * slot + level


def bit_numbers(mask: int) -> np.ndarray:
    """The numbers of the bits that are set, ascending."""
    data = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(data, bitorder="little").nonzero()[0]


class _Sweep:
    """Take off bits of one slot: of its entries in a tier that are not `wanted`, or (tier is None) of all."""

    __slots__ = ("slot", "tier", "todo", "wanted")

    def __init__(self, slot: int, tier: int | None, wanted: dict[bytes, None]) -> None:
        self.slot = slot
        self.tier = tier
        self.wanted = wanted
        self.todo: list[bytes] | None = None
        """Keys still to be looked at; None before the start."""


def reach_bits(instance: int, node: int) -> tuple[int, int, int]:
    return level_bit(instance, FAST), level_bit(instance, EXPECTED), level_bit(node, ANY)


class PrefixIndex:
    """At most `num_blocks_max` distinct blocks: when full, the oldest predictions make room, then new blocks are
    refused and counted."""

    def __init__(self, num_blocks_max: int) -> None:
        self.num_blocks_max = num_blocks_max
        self.num_refused = 0
        self.num_slow = 0
        """Entries in slow tiers, of all holders."""
        self._masks: dict[bytes, int] = {}
        self._shared: dict[int, int] = {}
        self._live = 0
        self._num_held = [0]
        self._predicted: list[dict[bytes, int]] = [{}]
        self.expiries: list[tuple[int, int, int, Sequence[bytes]]] = []
        """A heap: when predictions expire, their number, slot and keys."""
        self._num_predictions = 0
        self._free: list[int] = []
        self.sweeps: list[_Sweep] = []
        """To be gone on with as soon as there is time."""

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def width(self) -> int:
        """Number of slots ever given out, slot 0 included."""
        return len(self._num_held)

    def num_held(self, slot: int) -> int:
        """Confirmed entries of that holder."""
        return self._num_held[slot]

    # ------------------------------------------------------------ holders

    def add_holder(self) -> int:
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self.width
            self._num_held.append(0)
            self._predicted.append({})
        self.show(slot)
        return slot

    def show(self, slot: int) -> None:
        self._live |= _LEVEL_BITS << SLOT_BITS * slot

    def hide(self, slot: int) -> None:
        """The holder cannot be read now: it matches nothing, but its entries stay."""
        self._live &= ~(_LEVEL_BITS << SLOT_BITS * slot)

    def remove_holder(self, slot: int) -> None:
        self.hide(slot)
        self.sweeps = [sweep for sweep in self.sweeps if sweep.slot != slot]
        self.sweeps.append(_Sweep(slot, None, {}))

    # ------------------------------------------------------------ sweeps

    def sweep(self, num_blocks: int = SWEEP_BLOCKS) -> None:
        """Look at up to so many blocks for what must go."""
        while self.sweeps and num_blocks > 0:
            sweep = self.sweeps[0]
            if sweep.todo is None:
                sweep.todo = self._suspects(sweep.slot)
            keys = sweep.todo[-num_blocks:]
            del sweep.todo[-num_blocks:]
            num_blocks -= max(1, len(keys))
            self._clear(sweep, keys)
            if not sweep.todo:
                self.sweeps.pop(0)
                if sweep.tier is None:
                    heapq.heappush(self._free, sweep.slot)

    def _suspects(self, slot: int) -> list[bytes]:
        """Keys that the holder may have: its predictions, and all there are if it has confirmed any."""
        return list(self._masks) if self._num_held[slot] else list(self._predicted[slot])

    def _clear(self, sweep: _Sweep, keys: list[bytes]) -> None:
        slot, tier, wanted = sweep.slot, sweep.tier, sweep.wanted
        mark = (_ALL if tier is None else _MARK[tier]) << SLOT_BITS * slot
        get = self._masks.get
        found = [key for key in keys if get(key, 0) & mark and key not in wanted]
        if tier is not None:
            self.discard(slot, tier, found)
            return
        predicted = self._predicted[slot]
        for key in found:
            predicted.pop(key, None)
        self._move(slot, found, _NOTHING)
        if not self._num_held[slot] and not predicted:
            sweep.todo = []  # nothing is left of it further on

    # ------------------------------------------------------------ look-up

    def match(self, keys: Sequence[bytes]) -> Match:
        alive = self._live
        length = 0
        steps: list[tuple[int, int]] = []
        for mask, run in groupby(map(self._masks.get, keys)):
            if mask is None:
                break
            kept = alive & mask
            if kept != alive:
                if length:
                    steps.append((length, alive))
                alive = kept
                if not kept:
                    break
            length += len(list(run))
        if alive and length:
            steps.append((length, alive))
        return Match(steps, self.width, self.num_slow > 0)

    # ------------------------------------------------------------ confirmed entries

    def add(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        """tier: IN_FAST or IN_SLOW."""
        for sweep in self.sweeps:
            if sweep.slot == slot and sweep.tier == tier:
                sweep.wanted.update(dict.fromkeys(keys))
        if len(self._masks) + len(keys) > self.num_blocks_max:
            keys = self._admit(keys)
        shift = SLOT_BITS * slot
        masks, predicted = self._masks, self._predicted[slot]
        at = 0
        for old, run in groupby(map(masks.get, keys)):
            begin, at = at, at + len(list(run))
            bits = (old or 0) >> shift & _ALL
            if bits | tier == bits:
                continue
            new = self._share((old or 0) | tier << shift)
            changed = dict.fromkeys(keys[begin:at], new)
            masks.update(changed)
            if not bits & _CONFIRMED:
                self._num_held[slot] += len(changed)
                for key in changed if bits else ():
                    predicted.pop(key, None)
            if tier == IN_SLOW:
                self.num_slow += len(changed)

    def discard(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        self._move(slot, keys, _LEAVE[tier])

    def replace(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        """A snapshot: the holder has exactly these keys in that tier. What it had before and they do not contain goes
        with the sweeps, the first of which is made here."""
        self.sweeps = [sweep for sweep in self.sweeps if (sweep.slot, sweep.tier) != (slot, tier)]
        if self._num_held[slot]:
            self.sweeps.append(_Sweep(slot, tier, dict.fromkeys(keys)))
            self.sweep()
        self.add(slot, tier, keys)

    def _move(self, slot: int, keys: Sequence[bytes], becomes: tuple[int, ...]) -> None:
        """Replace the slot's bits of these blocks by becomes[bits], which takes off and never adds."""
        shift = SLOT_BITS * slot
        masks = self._masks
        at = 0
        for old, run in groupby(map(masks.get, keys)):
            begin, at = at, at + len(list(run))
            bits = (old or 0) >> shift & _ALL
            left = becomes[bits]
            if left == bits:
                continue
            assert old is not None
            changed = dict.fromkeys(keys[begin:at])
            new = old ^ (bits ^ left) << shift
            if new:
                masks.update(dict.fromkeys(changed, self._share(new)))
            else:
                for key in changed:
                    del masks[key]
            if bits & _CONFIRMED and not left & _CONFIRMED:
                self._num_held[slot] -= len(changed)
            if (bits ^ left) & _MARK[IN_SLOW]:
                self.num_slow -= len(changed)

    def _share(self, mask: int) -> int:
        """The one object of that value."""
        if len(self._shared) >= _SHARED_MAX:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    # ------------------------------------------------------------ predicted entries

    def predict(self, slot: int, keys: Sequence[bytes], expires_ns: int) -> None:
        """The holder will have these blocks soon. Of two predictions of the same block the later one decides."""
        if len(self._masks) + len(keys) > self.num_blocks_max:
            keys = self._admit(keys, parents_first=True)
        shift = SLOT_BITS * slot
        masks, predicted = self._masks, self._predicted[slot]
        at = 0
        for old, run in groupby(map(masks.get, keys)):
            begin, at = at, at + len(list(run))
            bits = (old or 0) >> shift & _ALL
            if bits & _CONFIRMED:
                continue
            part = keys[begin:at]
            predicted.update(dict.fromkeys(part, expires_ns))
            if not bits:
                masks.update(dict.fromkeys(part, self._share((old or 0) | _PREDICTED << shift)))
        self._num_predictions += 1
        heapq.heappush(self.expiries, (expires_ns, self._num_predictions, slot, keys))

    def expire(self, now: int) -> None:
        while self.expiries and self.expiries[0][0] <= now:
            self._expire_oldest()

    def _expire_oldest(self) -> None:
        expires_ns, _, slot, keys = heapq.heappop(self.expiries)
        predicted = self._predicted[slot]
        if predicted.keys().isdisjoint(keys):  # most often, as they were confirmed
            return
        gone = [key for key in keys if predicted.get(key, expires_ns + 1) <= expires_ns]
        for key in gone:
            predicted.pop(key, None)
        self._move(slot, gone, _EXPIRE)

    # ------------------------------------------------------------ room

    def _admit(self, keys: Sequence[bytes], *, parents_first: bool = False) -> list[bytes]:
        """Those that are known or for which there is room. parents_first: none after one that was refused, as its
        children would be unreachable."""
        admitted: dict[bytes, None] = {}
        num_new = 0
        for key in keys:
            if key not in self._masks and key not in admitted:
                if not self._make_room(num_new):
                    self.num_refused += 1
                    if parents_first:
                        break
                    continue
                num_new += 1
            admitted[key] = None
        # Making room may have dropped a key that was known.
        while sum(key not in self._masks for key in admitted) + len(self._masks) > self.num_blocks_max:
            admitted.popitem()
            self.num_refused += 1
        return list(admitted)

    def _make_room(self, num_new: int) -> bool:
        while len(self._masks) + num_new >= self.num_blocks_max and self.expiries:
            self._expire_oldest()
        return len(self._masks) + num_new < self.num_blocks_max

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """The counts and predictions are exactly what the masks say. O(index); for tests and idle times."""
        held = [0] * self.width
        predicted: list[dict[bytes, None]] = [{} for _ in held]
        num_slow = 0
        for key, mask in self._masks.items():
            assert mask > 0, "an empty mask is kept"
            for slot in dict.fromkeys((bit_numbers(mask) // SLOT_BITS).tolist()):
                bits = mask >> SLOT_BITS * slot & _ALL
                assert bits in (IN_FAST, IN_SLOW, IN_FAST | IN_SLOW, _PREDICTED), f"levels are not nested: {bits:04b}"
                held[slot] += bool(bits & _CONFIRMED)
                num_slow += bool(bits & _MARK[IN_SLOW])
                if bits == _PREDICTED:
                    predicted[slot][key] = None
        assert held == self._num_held, "counts differ from the masks"
        assert num_slow == self.num_slow, "the count of slow entries differs from the masks"
        assert predicted == [dict.fromkeys(keys) for keys in self._predicted], "predictions differ from the masks"
        assert len(self._masks) <= self.num_blocks_max
        idle = [*self._free, *(sweep.slot for sweep in self.sweeps if sweep.tier is None), 0]
        assert len(idle) == len(set(idle)), "a slot is free twice"
        assert not any(self._live >> SLOT_BITS * slot & _ALL for slot in idle), "a free slot is visible"
        assert not any(held[slot] or predicted[slot] for slot in self._free), "a free slot has entries"
