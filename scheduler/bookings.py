"""What was placed and is not over: the only file that writes the booked part of instances.

    book --> [prefill + decode] --release_prefill--> [decode] --release--> gone
                    |                                    |
                    +--- release / release_instance / release_frontend --> gone

A booking has a prefill part (until the first token) and a decode part (until the attempt ends). Each part is taken
off exactly once, whatever comes first: the attempt's end, the loss of the instance, or the loss of the frontend. A
decode part is *pending* from placement until a load report that must contain it.

The choices of one placement are booked each under its own key, as they end one by one; the first has the prefill part
of all, and the others are its siblings.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from mooncake.core.messages import Placed
from mooncake.core.types import AttemptKey, Slo
from mooncake.scheduler.pools import Instance
from mooncake.scheduler.starts import NoStarts, Starts
from mooncake.scheduler.view import View


class Booking(msgspec.Struct, eq=False):
    """`prefill` and `decode` are None once that part is released (or was never wanted). They are the same when the
    decode instance prefills in place. sequence_ns: what it adds to a decode step, as it was booked. joins_at: when it
    began to decode or is expected to, and bucket, the place of that in `Starts`; submitted_at: when the decode
    instance could first see it. answer: None after it was rebuilt from a frontend's snapshot; slo: none then."""

    key: AttemptKey
    num_tokens: int
    booked_at: int
    joins_at: int
    prefill: Instance | None = None
    decode: Instance | None = None
    prefill_ns: int = 0
    num_pages: int = 0
    sequence_ns: float = 0.0
    bucket: int = 0
    submitted_at: int | None = None
    siblings: tuple[Booking, ...] = ()
    answer: Placed | None = None
    slo: Slo = Slo()
    tenant: str = ""
    judged_tbt_ns: int | None = None
    """What admission compared with its objective, if it did."""

    @property
    def in_place(self) -> bool:
        return self.prefill is not None and self.prefill is self.decode


class Books:
    """starts: what is to know when sequences begin to decode."""

    def __init__(self, view: View, settle_ns: int, starts: Starts | NoStarts) -> None:
        self._view = view
        self._settle_ns = settle_ns
        self._starts = starts
        self.bookings: dict[AttemptKey, Booking] = {}
        self._num_booked = 0

    # ------------------------------------------------------------ book

    def book(
        self,
        key: AttemptKey,
        num_tokens: int,
        prefill: Instance | None,
        prefill_ns: int,
        decode: Instance | None,
        num_pages: int,
        joins_at: int,
        now: int,
        tenant: str = "",
        weight: float = 1.0,
    ) -> Booking:
        """The key must not be booked. Either part may be None, not both. joins_at: when it is expected to decode."""
        assert key not in self.bookings and (prefill is not None or decode is not None)
        booking = self.bookings[key] = Booking(key, num_tokens, now, joins_at, prefill, decode, prefill_ns, num_pages)
        booking.tenant = tenant
        turn = self._num_booked = self._num_booked + 1
        if prefill is not None:
            prefill.prefill_turn = turn
            prefill.num_prefills += 1
            prefill.prefill_ns += prefill_ns
            prefill.tenants.add(tenant, weight, prefill_ns)
            prefill.booked_until = max(now, prefill.booked_until) + prefill_ns
            prefill.set_work()
        if decode is not None:
            self._book_decode(booking, decode)
        if prefill is None or prefill is decode:
            self._submit(booking, now)
        return booking

    def book_sibling(self, first: Booking, key: AttemptKey, num_pages: int) -> Booking:
        """Another choice that decodes where `first` does, after the same prefill. The key must not be booked."""
        assert key not in self.bookings and first.decode is not None
        booking = Booking(key, first.num_tokens, first.booked_at, first.joins_at, None, first.decode, 0, num_pages)
        self.bookings[key] = booking
        booking.submitted_at = first.submitted_at
        booking.tenant = first.tenant
        first.siblings = (*first.siblings, booking)
        self._book_decode(booking, first.decode)
        return booking

    def _book_decode(self, booking: Booking, decode: Instance) -> None:
        _a, b, c = decode.decode
        sequence_ns = booking.sequence_ns = b + c * booking.num_tokens
        decode.num_decodes += 1
        decode.decoding[booking.tenant] += 1
        decode.turn = self._num_booked
        decode.pending[booking] = None
        decode.pending_ns += sequence_ns
        decode.pending_pages += booking.num_pages
        booking.bucket = self._starts.add(booking.joins_at, sequence_ns)
        if decode.pool is not None:
            decode.pool.set_load(decode)

    def see(self, instance: Instance, now: int) -> None:
        """A load report of that instance came: attempts sent long enough before it are in it."""
        settled = now - self._settle_ns
        seen = [
            booking
            for booking in instance.pending
            if booking.submitted_at is not None and booking.submitted_at <= settled
        ]
        for booking in seen:
            _unpend(booking, instance)

    # ------------------------------------------------------------ release

    def release_prefill(self, key: AttemptKey, now: int, *, done: bool = False) -> Booking | None:
        """The booking, if its prefill part was still booked. done: its first token is there; what was only
        computed then tells how fast the instance is."""
        booking = self.bookings.get(key)
        if booking is None or booking.prefill is None:
            return None
        instance = booking.prefill
        if done and not booking.in_place:
            only_computed = booking.answer is not None and booking.answer.source is None
            instance.prefill_done(booking.booked_at, booking.prefill_ns if only_computed else 0, now)
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

    def release_instance(self, instance: Instance, now: int) -> None:
        """All parts booked there. The attempts' other parts stay until their frontend ends them."""
        for booking in list(self.bookings.values()):
            if booking.prefill is instance:
                self._drop_prefill(booking, now)
            if booking.decode is instance:
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
        instance = booking.prefill
        assert instance is not None
        booking.prefill = None
        instance.num_prefills -= 1
        instance.prefill_ns -= booking.prefill_ns
        instance.tenants.remove(booking.tenant, booking.prefill_ns)
        # What is left runs one after the other from now; an overdue or early end thus corrects the forecast.
        instance.booked_until = now + instance.prefill_ns
        instance.set_work()
        self._submit(booking, now)
        for sibling in booking.siblings:
            self._submit(sibling, now)

    def _submit(self, booking: Booking, now: int) -> None:
        """The decode instance can see it from now on."""
        if booking.submitted_at is not None:
            return
        booking.submitted_at = booking.joins_at = now
        if booking.decode is not None:
            self._starts.remove(booking.bucket, booking.sequence_ns)
            booking.bucket = self._starts.add(now, booking.sequence_ns)

    def _drop_decode(self, booking: Booking) -> None:
        instance = booking.decode
        assert instance is not None
        instance.num_decodes -= 1
        instance.decoding[booking.tenant] -= 1
        if not instance.decoding[booking.tenant]:
            del instance.decoding[booking.tenant]
        self._starts.remove(booking.bucket, booking.sequence_ns)
        if booking in instance.pending:
            _unpend(booking, instance)
        elif instance.pool is not None:
            instance.pool.set_load(instance)
        booking.decode = None

    def _settle(self, booking: Booking) -> None:
        if booking.prefill is None and booking.decode is None:
            del self.bookings[booking.key]

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """What is booked of each instance is the sum over the bookings."""
        sums = {instance: [0, 0, 0] for instance in self._view.instances.values()}
        for key, booking in self.bookings.items():
            assert key == booking.key and (booking.prefill is not None or booking.decode is not None)
            if booking.prefill is not None:
                assert booking.in_place or booking.prefill.does_prefill
                sums[booking.prefill][0] += 1
                sums[booking.prefill][1] += booking.prefill_ns
            if booking.decode is not None:
                assert not booking.decode.does_prefill
                sums[booking.decode][2] += 1
        for instance, booked in sums.items():
            assert booked == [instance.num_prefills, instance.prefill_ns, instance.num_decodes], instance.info.name
            assert instance.tenants.sum() == (instance.num_prefills, instance.prefill_ns)
            assert instance.decoding.total() == instance.num_decodes
            pending = [booking.sequence_ns for booking in instance.pending]
            assert abs(sum(pending) - instance.pending_ns) <= 1e-6 * (1.0 + sum(pending))
            assert instance.pending_pages == sum(booking.num_pages for booking in instance.pending)
            assert all(booking.decode is instance for booking in instance.pending)
            assert all(self.bookings.get(booking.key) is booking for booking in instance.pending)


def _unpend(booking: Booking, instance: Instance) -> None:
    del instance.pending[booking]
    # Sums of floats keep a rest; nothing is nothing.
    instance.pending_ns = instance.pending_ns - booking.sequence_ns if instance.pending else 0.0
    instance.pending_pages -= booking.num_pages
    if instance.pool is not None:
        instance.pool.set_load(instance)
