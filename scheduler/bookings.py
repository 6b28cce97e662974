"""What was placed and is not over: the only file that writes the booked columns.

    book --> [prefill + decode] --release_prefill--> [decode] --release--> gone
                    |                                    |
                    +--- release / release_instance / release_frontend --> gone

A booking has a prefill part (until the first token) and a decode part (until the attempt ends). Each part is taken
off exactly once, whatever comes first: the attempt's end, the loss of the instance, or the loss of the frontend. A
decode part is *pending* from placement until a load report that must contain it.

The choices of one placement are booked each under its own key, as they end one by one; the first has the prefill part of
all, and the others are its siblings.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mooncake.core.messages import Placed, Prediction
from mooncake.core.types import AttemptKey
from mooncake.scheduler.view import Columns, View


class Booking:
    """`prefill` and `decode` are slots, or None once that part is released (or was never wanted). They are equal when
    the decode instance prefills in place."""

    __slots__ = (
        "answer",
        "booked_at",
        "decode",
        "key",
        "num_pages",
        "num_tokens",
        "pending",
        "prefill",
        "prefill_ns",
        "siblings",
        "submitted_at",
    )

    def __init__(self, key: AttemptKey, num_tokens: int, now: int) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.booked_at = now
        self.prefill: int | None = None
        self.decode: int | None = None
        self.prefill_ns = 0
        self.num_pages = 0
        self.pending = False
        self.submitted_at: int | None = None
        """When the decode instance could first see the attempt."""
        self.siblings: list[Booking] = []
        self.answer: Placed | None = None
        """None after it was rebuilt from a frontend's snapshot."""

    @property
    def in_place(self) -> bool:
        return self.prefill is not None and self.prefill == self.decode

    @property
    def prediction(self) -> Prediction | None:
        return self.answer.prediction if self.answer is not None else None


class Books:
    def __init__(self, view: View, settle_ns: int) -> None:
        self._view = view
        self._settle_ns = settle_ns
        self.bookings: dict[AttemptKey, Booking] = {}
        self._pending: dict[int, dict[AttemptKey, Booking]] = {}
        """By decode slot."""

    # ------------------------------------------------------------ book

    def book(
        self,
        key: AttemptKey,
        num_tokens: int,
        prefill: int | None,
        prefill_ns: int,
        decode: int | None,
        num_pages: int,
        now: int,
    ) -> Booking:
        """The key must not be booked. Either part may be None, not both."""
        assert key not in self.bookings and (prefill is not None or decode is not None)
        booking = self.bookings[key] = Booking(key, num_tokens, now)
        if prefill is not None:
            self._book_prefill(booking, prefill, prefill_ns, now)
        if decode is not None:
            self._book_decode(booking, decode, num_pages)
        if prefill is None or prefill == decode:
            booking.submitted_at = now
        return booking

    def book_sibling(self, first: Booking, key: AttemptKey, num_pages: int) -> Booking:
        """Another choice that decodes where `first` does, after the same prefill. The key must not be booked."""
        assert key not in self.bookings and first.decode is not None
        booking = self.bookings[key] = Booking(key, first.num_tokens, first.booked_at)
        booking.submitted_at = first.submitted_at
        first.siblings.append(booking)
        self._book_decode(booking, first.decode, num_pages)
        return booking

    def _book_prefill(self, booking: Booking, slot: int, prefill_ns: int, now: int) -> None:
        columns = self._view.columns
        booking.prefill, booking.prefill_ns = slot, prefill_ns
        columns.num_prefills[slot] += 1
        columns.prefill_ns[slot] += prefill_ns
        columns.busy_until[slot] = max(now, int(columns.busy_until[slot])) + prefill_ns

    def _book_decode(self, booking: Booking, slot: int, num_pages: int) -> None:
        columns = self._view.columns
        booking.decode, booking.num_pages, booking.pending = slot, num_pages, True
        columns.num_decodes[slot] += 1
        columns.pending_seqs[slot] += 1
        columns.pending_tokens[slot] += booking.num_tokens
        columns.pending_pages[slot] += num_pages
        self._pending.setdefault(slot, {})[booking.key] = booking

    def see(self, slot: int, now: int) -> None:
        """A load report of that instance came: attempts sent long enough before it are in it."""
        seen = [
            booking
            for booking in self._pending.get(slot, {}).values()
            if booking.submitted_at is not None and booking.submitted_at + self._settle_ns <= now
        ]
        for booking in seen:
            self._unpend(booking, slot)

    # ------------------------------------------------------------ release

    def release_prefill(self, key: AttemptKey, now: int) -> Booking | None:
        """The booking, if its prefill part was still booked."""
        booking = self.bookings.get(key)
        if booking is None or booking.prefill is None:
            return None
        self._drop_prefill(booking, now)
        self._settle(booking)
        return booking

    def release(self, key: AttemptKey, now: int) -> Booking | None:
        """The booking, if there was one."""
        booking = self.bookings.get(key)
        if booking is None:
            return None
        if booking.prefill is not None:
            self._drop_prefill(booking, now)
        if booking.decode is not None:
            self._drop_decode(booking)
        self._settle(booking)
        return booking

    def release_instance(self, slot: int, now: int) -> None:
        """All parts booked there. The attempts' other parts stay until their frontend ends them."""
        for booking in list(self.bookings.values()):
            if booking.prefill == slot:
                self._drop_prefill(booking, now)
            if booking.decode == slot:
                self._drop_decode(booking)
            self._settle(booking)

    def release_frontend(self, frontend: str, now: int) -> list[AttemptKey]:
        return self.release_others(frontend, (), now, now)

    def release_others(
        self, frontend: str, keep: Collection[AttemptKey], booked_before: int, now: int
    ) -> list[AttemptKey]:
        """Bookings of that frontend that are not in `keep` and not younger than `booked_before`; their keys."""
        lost = [
            key
            for key, booking in self.bookings.items()
            if key.frontend == frontend and key not in keep and booking.booked_at <= booked_before
        ]
        for key in lost:
            self.release(key, now)
        return lost

    def _drop_prefill(self, booking: Booking, now: int) -> None:
        slot, columns = booking.prefill, self._view.columns
        assert slot is not None
        columns.num_prefills[slot] -= 1
        columns.prefill_ns[slot] -= booking.prefill_ns
        # What is left runs one after the other from now; an overdue or early end thus corrects the forecast.
        columns.busy_until[slot] = now + columns.prefill_ns[slot]
        booking.prefill = None
        for each in (booking, *booking.siblings):
            if each.submitted_at is None:
                each.submitted_at = now

    def _drop_decode(self, booking: Booking) -> None:
        slot = booking.decode
        assert slot is not None
        if booking.pending:
            self._unpend(booking, slot)
        self._view.columns.num_decodes[slot] -= 1
        booking.decode = None

    def _unpend(self, booking: Booking, slot: int) -> None:
        columns = self._view.columns
        booking.pending = False
        columns.pending_seqs[slot] -= 1
        columns.pending_tokens[slot] -= booking.num_tokens
        columns.pending_pages[slot] -= booking.num_pages
        del self._pending[slot][booking.key]

    def _settle(self, booking: Booking) -> None:
        if booking.prefill is None and booking.decode is None:
            del self.bookings[booking.key]

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """The booked columns are the sums over the bookings."""
        view = self._view
        sums = {name: np.zeros_like(view.columns.num_decodes) for name in Columns.BOOKED}
        for key, booking in self.bookings.items():
            assert key == booking.key and (booking.prefill is not None or booking.decode is not None)
            if booking.prefill is not None:
                assert view.columns.is_prefill[booking.prefill] or view.columns.is_colocated[booking.prefill]
                sums["num_prefills"][booking.prefill] += 1
                sums["prefill_ns"][booking.prefill] += booking.prefill_ns
            if booking.decode is not None:
                assert view.columns.is_decode[booking.decode]
                sums["num_decodes"][booking.decode] += 1
                assert booking.pending == (key in self._pending.get(booking.decode, {}))
            if booking.pending:
                sums["pending_seqs"][booking.decode] += 1
                sums["pending_tokens"][booking.decode] += booking.num_tokens
                sums["pending_pages"][booking.decode] += booking.num_pages
        for name, column in sums.items():
            assert (getattr(view.columns, name) == column).all(), f"{name} differs from the bookings"
        assert sum(map(len, self._pending.values())) == sums["pending_seqs"].sum()
