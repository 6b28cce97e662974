"""How often the collector looks for reference cycles."""

from __future__ import annotations

GC_THRESHOLDS = (20_000, 20, 20)
"""For `gc.set_threshold`. Nearly everything here dies by reference count; with the default of 700 the collector took 7 % of a
frontend's time and 6 % of a replay's."""
