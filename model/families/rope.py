"""Rotary parameters of a config.json, in the two forms they are published in.

The old one has `rope_theta` beside `rope_scaling: {"type" or "rope_type", "factor", ...}`;
transformers 5 writes all of it into `rope_parameters`. Both may be there if they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ConfigError, RopeScaling
from model.families.fields import MAX_POSITIONS, ConfigFields, UnsupportedConfigError, show

SUPPORTED = "default, linear, llama3 and yarn are"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary base and scaling, and the context length they reach."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int


def read_rope(fields: ConfigFields, max_positions: int) -> Rope:
    """Theta (default 10,000) and scaling of a config whose max_position_embeddings is
    `max_positions`.

    YaRN's configs leave max_position_embeddings at what it was before the stretch or set it
    to the stretched length, as their authors please; the context is the longer of it and
    original_max_position_embeddings * factor. Raises `ConfigError` for what disagrees and
    `UnsupportedConfigError` for other scalings.
    """
    section = _section(fields)
    top_theta = fields.optional_number("rope_theta")
    _full_rotary(fields)
    if section is None:
        return Rope(_theta("rope_theta", top_theta), None, max_positions)
    _full_rotary(section)
    theta = section.optional_number("rope_theta")
    if theta is not None and top_theta is not None and theta != top_theta:
        raise ConfigError(
            f"rope_theta is {top_theta} but {section.name('rope_theta')} is {theta}: "
            "they must agree"
        )
    theta = _theta("rope_theta", top_theta if theta is None else theta)
    scaling = _scaling(section, max_positions)
    section.finish(harmless=("finetuned",))
    reach = max_positions
    if scaling is not None and scaling.kind == "yarn":
        reach = max(max_positions, int(scaling.original_max_positions * scaling.factor))
        if reach > MAX_POSITIONS:
            raise ConfigError(
                f"{section.name('original_max_position_embeddings')} "
                f"{scaling.original_max_positions} times {section.name('factor')} "
                f"{scaling.factor} is beyond {MAX_POSITIONS} positions"
            )
    return Rope(theta, scaling, reach)


def _section(fields: ConfigFields) -> ConfigFields | None:
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    if old and new and old != new:
        raise ConfigError(
            f"rope_scaling is {show(old)} but rope_parameters is {show(new)}: they must agree"
        )
    return fields.section("rope_parameters" if new else "rope_scaling")


def _theta(name: str, theta: float | None) -> float:
    theta = 10_000.0 if theta is None else theta
    if theta <= 1:
        raise ConfigError(f"{name} must be above 1, got {theta}")
    return theta


def _full_rotary(fields: ConfigFields) -> None:
    name = "partial_rotary_factor"
    if fields.number(name, 1.0) != 1.0:
        raise UnsupportedConfigError(
            fields.name(name), fields.get(name), "only 1.0, rotating whole heads, is"
        )


def _scaling(section: ConfigFields, max_positions: int) -> RopeScaling | None:
    old_kind, kind = section.get("type"), section.get("rope_type")
    if old_kind is not None and kind is not None and old_kind != kind:
        raise ConfigError(
            f"{section.name('type')} is {show(old_kind)} but {section.name('rope_type')} "
            f"is {show(kind)}: they must agree"
        )
    name = "type" if kind is None else "rope_type"
    kind = section.text(name, "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedConfigError(section.name(name), kind, SUPPORTED)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=section.number("factor"))
    original = section.integer(
        "original_max_position_embeddings", max_positions, maximum=MAX_POSITIONS
    )
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=section.number("factor"),
            original_max_positions=original,
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
        )
    return RopeScaling(
        kind="yarn",
        # A config may leave the factor out and let the two lengths say it.
        factor=section.number("factor", max_positions / original),
        original_max_positions=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=section.optional_number("attention_factor"),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.flag("truncate", default=True),
    )
