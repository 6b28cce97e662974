"""The life of an object's bytes in one tier, as a table. A pair that is not in it is illegal and changes nothing.

                           load ┌▶ LOADING ── loaded ─┐ (load failed: FREE)
                    reserve     │        commit       ▼      evict, remove while unleased
              FREE ────────▶ RESERVED ──────────▶ COMMITTED ─────────────────────────────▶ FREE
                              │    │                   │ remove while leased
                       cancel │    │ expire            ▼
                              ▼    ▼               CONDEMNED ──── last release ──────────▶ FREE
                            FREE  FENCED ─── cancel, late commit ────────────────────────▶ FREE

FENCED: the reservation ran out. Its key is free for the next writer, its bytes are not: the late writer may have the
segment mapped and still be writing. They are freed when that writer says something about them or its connection ends.
CONDEMNED: removed, so no longer found by its key, but readers that leased it still read it.
LOADING: it is being read from SSD into the space that was reserved for it; whoever asked for it waits.
Only COMMITTED objects are found by readers. Leases are a count beside the state: EVICT is for unleased objects only.

An object that is in memory and on SSD has two such lives. On SSD a copy is RESERVED while it is written, COMMITTED when all of
it is there, leased while it is read, and FENCED if its object was removed during the write. In memory an object that is being
written is leased by that write, so its bytes stay as they are until the shell says that it is done.
"""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    FREE = 0
    RESERVED = 1
    FENCED = 2
    COMMITTED = 3
    CONDEMNED = 4
    LOADING = 5


class Trigger(enum.IntEnum):
    RESERVE = 0
    COMMIT = 1
    CANCEL = 2
    EXPIRE = 3
    EVICT = 4
    REMOVE = 5
    CONDEMN = 6
    LAST_RELEASE = 7
    LOAD = 8
    LOADED = 9
    LOAD_FAILED = 10


TABLE: dict[tuple[State, Trigger], State] = {
    (State.FREE, Trigger.RESERVE): State.RESERVED,
    (State.RESERVED, Trigger.COMMIT): State.COMMITTED,
    (State.RESERVED, Trigger.CANCEL): State.FREE,
    (State.RESERVED, Trigger.EXPIRE): State.FENCED,
    (State.FENCED, Trigger.COMMIT): State.FREE,
    (State.FENCED, Trigger.CANCEL): State.FREE,
    (State.COMMITTED, Trigger.EVICT): State.FREE,
    (State.COMMITTED, Trigger.REMOVE): State.FREE,
    (State.COMMITTED, Trigger.CONDEMN): State.CONDEMNED,
    (State.CONDEMNED, Trigger.LAST_RELEASE): State.FREE,
    (State.RESERVED, Trigger.LOAD): State.LOADING,
    (State.LOADING, Trigger.LOADED): State.COMMITTED,
    (State.LOADING, Trigger.LOAD_FAILED): State.FREE,
}


def advance(state: State, trigger: Trigger) -> State | None:
    """The state that follows, or None if the trigger is illegal in this state."""
    return TABLE.get((state, trigger))
