"""Python's collector of cyclic garbage, kept from looking at what stays.

A process that serves holds several hundred thousand objects that never end: modules, the schema of
every route, the tokenizer. The collector walked them again and again, a fifth of the API's work for
a short request (loadtests/NOTES.md, 2026-11-28).
"""

from __future__ import annotations

import gc

# After how many objects more than were freed the collector looks at the young ones, after how many
# of those looks at the middle ones, and of these at all (Python's own: 700, 10, 10). What a request
# leaves in cycles is a few hundred objects, and most of it outlives a look at the young: without a
# look at all soon after, the process grew by 9 percent in eight minutes of full load.
THRESHOLDS = (10_000, 2, 2)


def keep_what_is_there() -> None:
    """Everything that is alive now stays for good. Called once, when a process begins to serve."""
    gc.collect()
    gc.freeze()
    gc.collect()  # it waits until a quarter of what it last saw has come; what is frozen counts
    gc.set_threshold(*THRESHOLDS)
