"""Sliding windows of a config.json: which layers see only the latest positions."""

from __future__ import annotations

from model.config import ConfigError
from model.families.fields import ConfigFields, UnsupportedConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = tuple[int | None, ...]


def read_layer_types(fields: ConfigFields, num_layers: int) -> tuple[str, ...] | None:
    """`layer_types`, one of full_attention and sliding_attention a layer, or None."""
    types = fields.texts("layer_types")
    if types is None:
        return None
    if len(types) != num_layers:
        raise ConfigError(
            f"layer_types has {len(types)} entries but num_hidden_layers is {num_layers}"
        )
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise UnsupportedConfigError(f"layer_types[{layer}]", kind, f"{FULL} and {SLIDING} are")
    return types


def same_window(fields: ConfigFields, window: int | None, num_layers: int) -> Windows:
    """The same window in every layer; `layer_types`, when given, must say the same."""
    expected = FULL if window is None else SLIDING
    for layer, kind in enumerate(read_layer_types(fields, num_layers) or ()):
        if kind != expected:
            raise UnsupportedConfigError(
                f"layer_types[{layer}]",
                kind,
                f"only {expected} is in this family with sliding_window {window}",
            )
    return () if window is None else (window,) * num_layers


def qwen_windows(fields: ConfigFields, num_layers: int) -> Windows:
    """Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on have
    the window, unless `layer_types` says it layer by layer."""
    use = fields.flag("use_sliding_window", default=False)
    # Written, and without meaning, when use_sliding_window is false.
    window = fields.optional_integer("sliding_window") if use else None
    fields.get("sliding_window")
    first = fields.integer("max_window_layers", 28, minimum=0)
    by_count = tuple(window if layer >= first else None for layer in range(num_layers))
    types = read_layer_types(fields, num_layers)
    if types is None:
        windows = by_count
    else:
        if SLIDING in types and window is None:
            raise ConfigError(
                f"layer_types[{types.index(SLIDING)}] is {SLIDING} but use_sliding_window is "
                f"{str(use).lower()} and sliding_window {fields.get('sliding_window')}"
            )
        if SLIDING not in types and any(by_count):
            raise ConfigError(
                f"use_sliding_window is true and max_window_layers {first} of {num_layers} "
                f"layers, but layer_types has only {FULL}"
            )
        windows = tuple(window if kind == SLIDING else None for kind in types)
    return windows if any(windows) else ()


def drop_idle(windows: Windows, max_positions: int) -> Windows:
    """A window as long as the context hides nothing: leave it out."""
    kept = tuple(w if w is not None and w < max_positions else None for w in windows)
    return kept if any(kept) else ()
