"""Python's collector of cyclic garbage, kept from looking at what stays.

A process that serves holds several hundred thousand objects that never end: modules, the schema of
every route, the tokenizer. The collector walked them again and again, a fifth of the API's work for
a short request (loadtests/NOTES.md, 2026-11-28).
"""

from __future__ import annotations

import gc

# Objects more than were freed before the collector looks at the young ones (Python's own: 700).
# What a request leaves behind in cycles is a few hundred objects.
YOUNG = 20_000


def keep_what_is_there() -> None:
    """Everything that is alive now stays for good. Called once, when a process begins to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
