"""What goes into a `StoreCore` and what comes out.

`client` numbers a connection; the shell never uses a number twice. `request_id` is the client's own and comes back in
the answer. A reservation and a lease are both named by the object's generation, its *number*: unique in a node's life.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.core.types import Tier
from mooncake.store.types import CommitStatus, Places, PutMode, Puts

_KEY_LENGTHS = {OBJECT_KEY_BYTES}
MAX_BATCH = 16_384
"""Keys or numbers of one event: bounds the time one client can hold the node, about 20 ms."""
TENANT_BYTES_MAX = 256
"""Of a name in a request; those of key files have 64."""


class Event(msgspec.Struct, frozen=True, tag=True):
    pass


class Request(Event, frozen=True):
    """An event that is answered by exactly one Reply or Fault."""

    client: int
    request_id: int


class Reserve(Request, frozen=True):
    """Ask for space for objects to be written. Answered by Puts.

    lease_existing: lease those that EXIST to the client. all_or_nothing: if one key gets no room, none is reserved or
    leased and all are REFUSED. ephemeral: the objects are freed as soon as their last lease goes and are not reported
    to the directory; ephemeral_last: only the last of them. checksums: xxh3-64 of the contents, one per key; mandatory
    in STRICT mode. tenant: whose it is, from a client that puts for many, in place of its own. What exceeds the quota of one
    that is named here is not refused but ephemeral: it can be handed over, and is not kept."""

    keys: tuple[bytes, ...]
    sizes: tuple[int, ...]
    mode: PutMode = PutMode.EQUIVALENT
    lease_existing: bool = False
    all_or_nothing: bool = False
    ephemeral: bool = False
    checksums: tuple[int, ...] = ()
    ephemeral_last: bool = False
    tenant: str = ""


class Commit(Request, frozen=True):
    """Make written objects visible. Answered by a CommitStatus per number. lease: those committed are leased to the
    client. checksums: xxh3-64 of the contents, one per number, or None for one that is not known; or none at all."""

    numbers: tuple[int, ...]
    lease: bool = False
    checksums: tuple[int | None, ...] = ()


class Grant(Request, frozen=True):
    """Ask for space for objects that have no keys yet, to be written and named later. Answered by Places, None for what finds
    no room at once."""

    sizes: tuple[int, ...]


class Name(Request, frozen=True):
    """Commit granted and written space under these keys, which may be of fewer bytes than it has. Answered by a CommitStatus
    per key. checksums as in Commit."""

    keys: tuple[bytes, ...]
    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    checksums: tuple[int | None, ...] = ()


class Cancel(Request, frozen=True):
    """Give reservations up. Answered by a bool per number: whether it was one of this client."""

    numbers: tuple[int, ...]


class Lease(Request, frozen=True):
    """Answered by Places. A key leased twice must be released twice. tenant: who wants it, as in Reserve; what has to be read
    from SSD is its."""

    keys: tuple[bytes, ...]
    tenant: str = ""


class Release(Request, frozen=True):
    """Answered by a bool per number: whether the client held a lease of it. In chain order, prefix first."""

    numbers: tuple[int, ...]


class Exists(Request, frozen=True):
    """Answered by a bool per key. Does not count as a use."""

    keys: tuple[bytes, ...]


class Remove(Request, frozen=True):
    """Answered by a bool per key: whether a committed object was removed. Readers that leased it keep it until they
    release. damaged: what they read does not have its checksum."""

    keys: tuple[bytes, ...]
    damaged: bool = False


class ClientTenant(Event, frozen=True):
    """The first event of a client that acts for a tenant: what it puts is that tenant's."""

    client: int
    tenant: str


class UsedElsewhere(Event, frozen=True):
    """What other nodes have of each tenant, bytes of memory. Those that are not named have none there."""

    usage: dict[str, int]


class ClientGone(Event, frozen=True):
    """The connection ended, and with it every claim of the client."""

    client: int


class Flush(Event, frozen=True):
    """Report what has changed now, and not later."""


class Used(Event, frozen=True):
    """Readers found these by themselves and read them: rows, a batch each time in chain order. Rows of objects that are gone
    by now are passed over, or taken for those that have their place."""

    batches: tuple[tuple[int, ...], ...]


class Adopted(Event, frozen=True):
    """The first event of a node that found objects of a life before in its segment: what they are, column by column, those
    first that are to be evicted first."""

    keys: tuple[bytes, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    numbers: tuple[int, ...]
    checksums: tuple[int | None, ...]
    owners: tuple[int, ...] = ()
    """Numbers of tenants (`mooncake.store.quotas`), 0 for none."""


class SnapshotWanted(Event, frozen=True):
    """The directory missed something. Gives a Snapshot, with what was still to be reported before it."""


class Tick(Event, frozen=True):
    """The deadline passed."""


class SsdWritten(Event, frozen=True):
    """A WriteSsd is done. failed: indices of objects that could not be written. corrupt: of those that were not, as their
    contents in memory are not what was committed. checksums: of all contents, or none."""

    job: int
    failed: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()
    checksums: tuple[int, ...] = ()


class SsdRead(Event, frozen=True):
    """A ReadSsd is done. failed: indices of objects that could not be read. corrupt: of those whose checksum was wrong."""

    job: int
    failed: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()


class SsdRecovered(Event, frozen=True):
    """The first event of a node whose SSD has contents: what an earlier life left there, oldest first, column by column.
    sequences: of all extents; 0, it was never opened."""

    keys: tuple[bytes, ...]
    sizes: tuple[int, ...]
    ssd_offsets: tuple[int, ...]
    checksums: tuple[int, ...]
    sequences: tuple[int, ...]


Results = Puts | Places | tuple[CommitStatus, ...] | tuple[bool, ...]


class Command(msgspec.Struct, frozen=True, tag=True):
    pass


class Reply(Command, frozen=True):
    client: int
    request_id: int
    results: Results


class Fault(Command, frozen=True):
    """The request was invalid and nothing was done; `detail` names the argument."""

    client: int
    request_id: int
    detail: str


class Report(Command, frozen=True, omit_defaults=True):
    """Objects that a tier gained and lost since the report before; each tier's seq grows by one."""

    epoch: int
    seq: int
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    tier: Tier = Tier.DRAM


class Snapshot(Command, frozen=True, omit_defaults=True):
    """All objects of a tier as of `seq`; reports up to seq are contained."""

    epoch: int
    seq: int
    keys: tuple[bytes, ...]
    tier: Tier = Tier.DRAM


class Usage(Command, frozen=True):
    """What tenants that have a quota use of this node's memory, in bytes, as it has changed."""

    epoch: int
    usage: dict[str, int]


NodeReport = Report | Snapshot | Usage
"""What a directory is told."""


class SsdJob(Command, frozen=True):
    """Objects column by column. offsets: in the segment; ssd_offsets: on SSD. checksums: None where there is none. The
    shell answers every job once, in any order; until then it may touch both ranges of each object."""

    job: int
    keys: tuple[bytes, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    ssd_offsets: tuple[int, ...]
    checksums: tuple[int | None, ...]


class SsdRun(msgspec.Struct, frozen=True):
    """The next `count` objects of a job lie one behind the other in one extent, and their entries are to be written to
    the pages of its table from `table_offset` on, after them. opens: the extent is new; its page 0 is to be written
    before all."""

    count: int
    extent: int
    sequence: int
    table_offset: int
    opens: bool


class WriteSsd(SsdJob, frozen=True):
    """From the segment to SSD. Answered by SsdWritten. An object of size 0 is one that was removed: it has an entry
    only."""

    runs: tuple[SsdRun, ...]


class ReadSsd(SsdJob, frozen=True):
    """From SSD into the segment. Answered by SsdRead."""


class SsdRests(Command, frozen=True):
    """Writes failed, so many jobs in a row: none is made for a while. What is evicted meanwhile is lost."""

    num_failures: int
    rest_ns: int


def fault_of(event: Request, capacity: int) -> str | None:
    """What is wrong with a request, naming the argument, or None."""
    return _CHECKS[type(event)](event, capacity)


def _check_keys(event: Exists | Remove, capacity: int) -> str | None:
    return _fault_of_keys(event.keys)


def _check_lease(event: Lease, capacity: int) -> str | None:
    return _fault_of_keys(event.keys) or _fault_of_tenant(event.tenant)


def _check_numbers(event: Cancel | Release, capacity: int) -> str | None:
    return _fault_of_numbers(event.numbers)


def _check_commit(event: Commit, capacity: int) -> str | None:
    return _fault_of_numbers(event.numbers) or _fault_of_checksums(event.checksums, len(event.numbers))


def _check_grant(event: Grant, capacity: int) -> str | None:
    if not 0 < len(event.sizes) <= MAX_BATCH:
        return f"sizes: a batch has 1 to {MAX_BATCH}, got {len(event.sizes)}"
    return _fault_of_sizes(event.sizes, capacity)


def _check_name(event: Name, capacity: int) -> str | None:
    count = len(event.keys)
    if len(event.numbers) != count or len(event.sizes) != count:
        return f"numbers: {len(event.numbers)}, and {len(event.sizes)} sizes, for {count} keys"
    fault = _fault_of_keys(event.keys) or _fault_of_sizes(event.sizes, capacity)
    if fault is None and len(set(event.keys)) != count:
        fault = "keys: a key is in the batch twice"
    return fault or _fault_of_checksums(event.checksums, count)


def _check_reserve(event: Reserve, capacity: int) -> str | None:
    return fault_of_reserve(event, 0, capacity) or _fault_of_tenant(event.tenant)


def fault_of_reserve(event: Reserve, num_found: int, capacity: int) -> str | None:
    """As `fault_of`. num_found: so many leading keys are known to be sound, as a store has them."""
    keys, sizes = event.keys[num_found:], event.sizes[num_found:]
    if not 0 < len(event.keys) <= MAX_BATCH or (keys and set(map(len, keys)) != _KEY_LENGTHS):
        return _fault_of_keys(event.keys)
    if len(event.sizes) != len(event.keys):
        return f"sizes: {len(event.sizes)} for {len(event.keys)} keys"
    if len(set(keys)) != len(keys):
        return "keys: a key is in the batch twice"
    if sizes and not 0 < min(sizes) <= max(sizes) <= capacity:
        return _fault_of_sizes(event.sizes, capacity)
    if event.mode is PutMode.STRICT and not event.checksums:
        return "checksums: a strict put needs them"
    return _fault_of_checksums(event.checksums, len(event.keys)) if event.checksums else None


def _fault_of_sizes(sizes: tuple[int, ...], capacity: int) -> str | None:
    if 0 < min(sizes) <= max(sizes) <= capacity:
        return None
    at, size = next((at, size) for at, size in enumerate(sizes) if not 0 < size <= capacity)
    return f"sizes[{at}]: must be between 1 and the segment's {capacity} bytes, got {size}"


_CHECKS: dict[type[Request], Callable[[Any, int], str | None]] = {
    Reserve: _check_reserve,
    Commit: _check_commit,
    Grant: _check_grant,
    Name: _check_name,
    Cancel: _check_numbers,
    Lease: _check_lease,
    Release: _check_numbers,
    Exists: _check_keys,
    Remove: _check_keys,
}


def _fault_of_keys(keys: tuple[bytes, ...]) -> str | None:
    if not 0 < len(keys) <= MAX_BATCH:
        return f"keys: a batch has 1 to {MAX_BATCH}, got {len(keys)}"
    if set(map(len, keys)) == _KEY_LENGTHS:
        return None
    at, size = next((at, len(key)) for at, key in enumerate(keys) if len(key) != OBJECT_KEY_BYTES)
    return f"keys[{at}]: must have {OBJECT_KEY_BYTES} bytes, got {size}"


def _fault_of_tenant(tenant: str) -> str | None:
    if len(tenant.encode()) <= TENANT_BYTES_MAX:
        return None
    return f"tenant: must have at most {TENANT_BYTES_MAX} bytes, got {len(tenant.encode())}"


def _fault_of_numbers(numbers: tuple[int, ...]) -> str | None:
    if 0 < len(numbers) <= MAX_BATCH:
        return None
    return f"numbers: a batch has 1 to {MAX_BATCH}, got {len(numbers)}"


def _fault_of_checksums(checksums: tuple[int | None, ...], count: int) -> str | None:
    if len(checksums) not in (0, count):
        return f"checksums: {len(checksums)} for {count} objects"
    known = [checksum for checksum in checksums if checksum is not None]
    if known and not 0 <= min(known) <= max(known) < 1 << 64:
        return "checksums: must be unsigned 64-bit numbers"
    return None
