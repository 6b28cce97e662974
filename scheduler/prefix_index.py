"""Which holder has which block: one dict from block key to a bit mask, so that one walk along a request's keys gives
the match length of every holder at once.

A holder (an instance's pages, or a store node) owns a slot, and a slot owns three adjacent bits of every mask. They are
nested, each a superset of the one before, so that the same walk gives three match lengths per holder:

    level FAST      in the holder's fast tier (hbm of an instance, dram of a node)
    level ANY       in any of its tiers (fast or ssd)
    level EXPECTED  there, or expected to be there when a request placed now would need it

    slot:      ... |    2    |    1    |    0    |      slot 0 belongs to nobody: its lengths are always zero
    mask bits: ... | E  A  F | E  A  F | -  -  - |      confirmed fast 111, ssd only 110, predicted only 100

Confirmed entries come and go by the holder's reports and are never guessed away; predicted ones expire. Keys are opaque
bytes: a hand-over's partial key is never asked for, so it matches nothing.

Removing a holder hides its bits at once and clears its blocks in bounded sweeps; the slot is given out again only
when no mask has its bits any more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

FAST, ANY, EXPECTED = 0, 1, 2
LEVELS = 3

IN_FAST, IN_SLOW = 1, 2
"""Flags of a confirmed entry: the tiers of the holder that have the block."""

_BITS = (0b000, 0b111, 0b110, 0b111)
"""Bits of a confirmed entry by its flags."""
_PREDICTED = 0b100
_ALL = 0b111
_FEW_BITS = 6
"""Up to so many bits a loop is cheaper than unpacking the whole mask."""
SWEEP_BLOCKS = 20_000
"""Blocks cleared per sweep: about 10 ms."""


class Match:
    """Result of one walk: `steps` are (length, mask of the level bits whose run ends after that length), lengths
    ascending."""

    __slots__ = ("_lengths", "steps", "width")

    def __init__(self, steps: list[tuple[int, int]], width: int) -> None:
        self.steps = steps
        self.width = width
        self._lengths: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Match lengths in blocks, int64 of shape (slots, levels). Made on first use; read only."""
        if self._lengths is None:
            self._lengths = self._expand()
        return self._lengths

    def _expand(self) -> np.ndarray:
        out = np.zeros(self.width * LEVELS, dtype=np.int64)
        for length, mask in self.steps:
            if mask.bit_count() > _FEW_BITS:
                data = np.frombuffer(mask.to_bytes((out.size + 7) // 8, "little"), dtype=np.uint8)
                out[np.unpackbits(data, count=out.size, bitorder="little").view(np.bool_)] = length
                continue
            while mask:
                low = mask & -mask
                out[low.bit_length() - 1] = length
                mask ^= low
        return out.reshape(self.width, LEVELS)


class PrefixIndex:
    """At most `num_blocks_max` distinct blocks: when full, the oldest predictions make room, then new blocks are
    refused and counted."""

    def __init__(self, num_blocks_max: int) -> None:
        self.num_blocks_max = num_blocks_max
        self.num_refused = 0
        self._masks: dict[bytes, int] = {}
        self._live = 0
        self._held: list[dict[bytes, int]] = [{}]
        self._predicted: list[dict[bytes, int]] = [{}]
        self._expiries: list[tuple[int, int, int, Sequence[bytes]]] = []
        self._num_predictions = 0
        self._free: list[int] = []
        self._dying: list[int] = []

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def width(self) -> int:
        """Number of slots ever given out, slot 0 included."""
        return len(self._held)

    # ------------------------------------------------------------ holders

    def add_holder(self) -> int:
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self.width
            self._held.append({})
            self._predicted.append({})
        self.show(slot)
        return slot

    def show(self, slot: int) -> None:
        self._live |= _ALL << LEVELS * slot

    def hide(self, slot: int) -> None:
        """The holder cannot be read now: it matches nothing, but its entries stay."""
        self._live &= ~(_ALL << LEVELS * slot)

    def remove_holder(self, slot: int) -> None:
        self.hide(slot)
        self._dying.append(slot)

    @property
    def sweeping(self) -> bool:
        return bool(self._dying)

    def sweep(self, num_blocks: int = SWEEP_BLOCKS) -> None:
        """Clear up to so many entries of removed holders."""
        while self._dying and num_blocks > 0:
            slot = self._dying[0]
            entries = self._held[slot] or self._predicted[slot]
            if not entries:
                heapq.heappush(self._free, self._dying.pop(0))
                continue
            for _ in range(min(num_blocks, len(entries))):
                key, _value = entries.popitem()
                self._write(slot, key, 0)
                num_blocks -= 1

    # ------------------------------------------------------------ look-up

    def match(self, keys: Iterable[bytes]) -> Match:
        get = self._masks.get
        alive = self._live
        length = 0
        steps: list[tuple[int, int]] = []
        for key in keys:
            kept = alive & get(key, 0)
            if kept != alive:
                if length:
                    steps.append((length, alive ^ kept))
                alive = kept
                if not kept:
                    break
            length += 1
        if alive and length:
            steps.append((length, alive))
        return Match(steps, self.width)

    # ------------------------------------------------------------ confirmed entries

    def add(self, slot: int, flag: int, keys: Iterable[bytes]) -> None:
        held, predicted = self._held[slot], self._predicted[slot]
        for key in keys:
            if key not in self._masks and not self._make_room():
                self.num_refused += 1
                continue
            flags = held.get(key, 0) | flag
            held[key] = flags
            predicted.pop(key, None)
            self._write(slot, key, _BITS[flags])

    def discard(self, slot: int, flag: int, keys: Iterable[bytes]) -> None:
        held = self._held[slot]
        for key in keys:
            flags = held.get(key, 0)
            if not flags & flag:
                continue
            if flags == flag:
                del held[key]
            else:
                held[key] = flags ^ flag
            self._write(slot, key, _BITS[flags ^ flag])

    def replace(self, slot: int, flag: int, keys: Sequence[bytes]) -> None:
        """A snapshot: afterwards the holder has exactly these keys in that tier."""
        wanted = frozenset(keys)
        self.discard(slot, flag, [key for key, flags in self._held[slot].items() if flags & flag and key not in wanted])
        self.add(slot, flag, keys)

    # ------------------------------------------------------------ predicted entries

    def predict(self, slot: int, keys: Sequence[bytes], expires_ns: int) -> None:
        """The holder will have these blocks soon. A later prediction of the same block prolongs it."""
        masks, held, predicted = self._masks, self._held[slot], self._predicted[slot]
        bit = _PREDICTED << LEVELS * slot
        for key in keys:
            if key in held:
                continue
            mask = masks.get(key, 0)
            if not mask and not self._make_room():
                self.num_refused += 1
                break  # its children would be unreachable
            masks[key] = mask | bit
            predicted[key] = max(expires_ns, predicted.get(key, 0))
        self._num_predictions += 1
        heapq.heappush(self._expiries, (expires_ns, self._num_predictions, slot, keys))

    def expire(self, now: int) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            self._expire_oldest()

    def deadline(self) -> int | None:
        return self._expiries[0][0] if self._expiries else None

    def _expire_oldest(self) -> None:
        expires_ns, _, slot, keys = heapq.heappop(self._expiries)
        predicted = self._predicted[slot]
        for key in keys:
            if predicted.get(key, expires_ns + 1) <= expires_ns:
                del predicted[key]
                self._write(slot, key, 0)

    def _make_room(self) -> bool:
        while len(self._masks) >= self.num_blocks_max and self._expiries:
            self._expire_oldest()
        return len(self._masks) < self.num_blocks_max

    def _write(self, slot: int, key: bytes, bits: int) -> None:
        shift = LEVELS * slot
        mask = self._masks.get(key, 0) & ~(_ALL << shift) | bits << shift
        if mask:
            self._masks[key] = mask
        else:
            self._masks.pop(key, None)

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """The masks are exactly what the holders' entries say. O(index); for tests and idle times."""
        expected: dict[bytes, int] = {}
        for slot in range(self.width):
            assert not self._held[slot].keys() & self._predicted[slot].keys(), (
                f"slot {slot}: confirmed and predicted at once"
            )
            for key, flags in self._held[slot].items():
                expected[key] = expected.get(key, 0) | _BITS[flags] << LEVELS * slot
            for key in self._predicted[slot]:
                expected[key] = expected.get(key, 0) | _PREDICTED << LEVELS * slot
        assert expected == self._masks, "masks differ from the holders' entries"
        assert len(self._masks) <= self.num_blocks_max
        idle = [*self._free, *self._dying, 0]
        assert len(idle) == len(set(idle)), "a slot is free twice"
        assert not any(self._live >> LEVELS * slot & _ALL for slot in idle), "a free slot is visible"
        assert not any(self._held[slot] or self._predicted[slot] for slot in self._free), "a free slot has entries"
