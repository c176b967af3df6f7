"""How size changes the answer, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadtests.report import computed, style
from loadtests.report.drawing import LARGE, Drawing, Material, name_of
from loadtests.report.lanes import Lane

CONTEXT = 512
READING_TOKENS_PER_S = 10.0
MANY = 256
HOURS = 730.0  # of a month


def size(material: Material) -> Drawing:
    """Tokens/s of one stream and of many, against the number of parameters."""
    models = [
        *dict.fromkeys(["stories", "gpt2", "qwen3-0.6b", LARGE, *material.models]),
    ]
    models = sorted(models, key=lambda model: computed.parameters_of(_config(material, model)))
    sizes = [computed.parameters_of(_config(material, model)) for model in models]
    figure, ((*axes,),) = style.panels(2, height_in=4.3)
    for one, batch in zip(axes, (1, 32), strict=True):
        for lane in material.lanes:
            roofs = [
                computed.decode_tokens_per_s(
                    computed.needs_of(_config(material, model), "bfloat16"),
                    lane.roof,
                    batch,
                    CONTEXT,
                )
                for model in models
            ]
            word = "roof" if lane.is_measured else "roof, computed"
            one.plot(sizes, roofs, ":", color=lane.colour, label=f"{lane.name}: {word}")
            points = [
                (computed.parameters_of(run.config), offline.decode_tokens_per_s)
                for run in lane.runs.values()
                for offline in run.offline
                if offline.batch == batch
            ]
            if points:
                xs, ys = zip(*sorted(points), strict=True)
                one.plot(xs, ys, "o-", color=lane.colour, label=f"{lane.label}")
        one.axhline(READING_TOKENS_PER_S * batch, color=style.FAINT, lw=1, ls=(0, (6, 3)))
        one.annotate(
            "each reader at 10 tokens/s",
            (sizes[-1], READING_TOKENS_PER_S * batch),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox={"fc": style.PAPER, "ec": "none", "pad": 1},  # a roof may pass there
        )
        style.log_axes(one)
        one.set_xticks(sizes, [style.short(value) for value in sizes])
        style.title(one, "one stream" if batch == 1 else f"{batch} streams together")
        one.set_xlabel("parameters")
    axes[0].set_ylabel("decode, tokens/s")
    style.legend(figure, axes, columns=2)
    return Drawing(
        "size",
        "How model size changes the answer",
        _size_claim(material),
        (
            "A token of one stream takes as long as it takes to read every weight once: speed "
            "falls as 1/parameters, on every device, and the distance between the lines is the "
            "ratio of their memories. A model of 5 M parameters is fast on anything; one of 8 B "
            "in bfloat16 is 15 GB a token.",
            "For many streams the ratio of arithmetic takes over, and the distance between the "
            "lines grows. Below the dashed line a reader waits for the text.",
        ),
        figure,
        "Decode speed against the number of parameters for one stream and for 32.",
    )


def _config(material: Material, model: str) -> dict[str, object]:
    if model == "stories" and not any(run.model == model for run in material.runs):
        import json

        from model.checkpoint_files import bundled_checkpoint

        raw: dict[str, object] = json.loads((bundled_checkpoint() / "config.json").read_text())
        return raw
    return material.config(model)


def _size_claim(material: Material) -> str:
    needs, lane = material.needs(LARGE), material.lanes[0]
    speed = computed.decode_tokens_per_s(needs, lane.roof, 1, CONTEXT)
    others = [
        f"{computed.decode_tokens_per_s(needs, other.roof, 1, CONTEXT):.0f} on {other.name}"
        for other in material.lanes[1:]
    ]
    return (
        f"{name_of(LARGE)} for one reader, computed: at most {speed:.1f} tokens/s on {lane.name}; "
        f"{' and '.join(others)}."
    )


@dataclass(frozen=True, slots=True)
class Serving:
    """A way to serve one model: a device under a load, with the speed it has there."""

    lane: Lane
    label: str
    tokens_per_s: float
    is_computed: bool


def servings(material: Material, model: str) -> list[Serving]:
    """Alone and with many streams, measured where something was; computed ones are upper bounds."""
    found = []
    needs = material.needs(model)
    for lane in material.lanes:
        run = lane.runs.get(model)
        if run is not None and run.served is not None:
            closed = run.served.closed
            best = max(closed, key=lambda one: one.point.tokens_per_s)
            for one in dict.fromkeys((closed[0].users, best.users)):
                point = next(x.point for x in closed if x.users == one)
                label = f"{lane.name}, {one} at a time, measured"
                found.append(Serving(lane, label, point.tokens_per_s, is_computed=False))
            continue
        users = MANY
        if lane.memory_bytes is not None:
            users = min(MANY, computed.sequences_that_fit(needs, lane.memory_bytes, CONTEXT))
        for count in (1, users):
            speed = computed.served_tokens_per_s(needs, lane.roof, count, 128, 128)
            label = f"{lane.name}, {count} at a time, computed"
            found.append(Serving(lane, label, speed, is_computed=True))
    return found


def cost(material: Material) -> Drawing:
    """Dollars and kilowatt hours of a million tokens."""
    model = material.served[-1] if material.served else LARGE
    rows = servings(material, model)
    figure, ((money, energy),) = style.panels(2, height_in=1.4 + 0.42 * len(rows))
    for axes, value, unit in (
        (
            money,
            lambda s: computed.cost_per_million(s.lane.running.dollars_per_hour, s.tokens_per_s),
            "$",
        ),
        (
            energy,
            lambda s: computed.energy_per_million_kwh(s.lane.running.watts, s.tokens_per_s),
            "kWh",
        ),
    ):
        values = [value(row) for row in rows]
        for place, (row, height) in enumerate(zip(rows, values, strict=True)):
            hatch = "////" if row.is_computed else None
            axes.barh(
                place,
                height,
                color=row.lane.colour,
                height=0.62,
                hatch=hatch,
                edgecolor=style.PAPER,
            )
            axes.annotate(
                f"{height:.2g}",
                (height, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        style.log_axes(axes, y=False)
        axes.set_xlim(min(values) / 3, max(values) * 5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{unit} for a million tokens of {name_of(model)}")
    money.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8.5)
    energy.set_yticks([])
    prices = "; ".join(
        f"{lane.name} ${lane.running.dollars_per_hour:.2f} an hour, {lane.running.watts:.0f} W"
        for lane in material.lanes
    )
    return Drawing(
        "cost",
        "Cost and energy of a million tokens",
        f"Computed with {prices}. These are assumptions: edit them in the table below.",
        (
            "A device costs the same for an hour whether it decodes one stream or 256, so the "
            "price of a token is the price of an hour over the tokens that shared it. One stream "
            "on a GPU pays for arithmetic that waits for the W of XW to be read.",
            "Hatched bars are computed from roofs, so they are the least that it could cost; a "
            "real server reaches a part of its roof. Watts are of the device alone, at its limit.",
        ),
        figure,
        "Dollars and kilowatt hours for a million tokens, by device and load.",
    )


def demand(material: Material) -> Drawing:
    """Dollars a month against the tokens that are wanted: where a CPU is the right choice."""
    models = [material.served[0] if material.served else "stories", LARGE]
    figure, ((*axes,),) = style.panels(len(models), height_in=4.1)
    claims = []
    for one, model in zip(axes, models, strict=True):
        best = {
            lane.name: max((s for s in servings(material, model) if s.lane is lane), key=_speed)
            for lane in material.lanes
        }
        wanted = [10 ** (n / 20) for n in range(-40, 101)]
        for lane in material.lanes:
            serving = best[lane.name]
            bills = [
                lane.running.dollars_per_hour * HOURS * math.ceil(w / serving.tokens_per_s)
                for w in wanted
            ]
            kind = "computed" if serving.is_computed else "measured"
            one.plot(wanted, bills, color=lane.colour, label=f"{lane.name} ({kind} speed)")
        one.set_ylim(10, 1e6)
        style.log_axes(one, x_ticks=(0.01, 1, 100, 10_000))
        style.title(one, name_of(model))
        one.set_xlabel("tokens/s wanted, on average")
        claims.append(_crossing(material, model, best))
    axes[0].set_ylabel("dollars a month")
    style.legend(figure, axes, columns=3)
    return Drawing(
        "demand",
        "When a CPU is the right choice",
        " ".join(claims),
        (
            "Machines are rented whole. While one CPU machine keeps up with what is wanted, it is "
            "the cheaper one however slow it is for a token; each further one adds its price, and "
            "somewhere one GPU does the work of all of them. Hours that wait for a reader cost as "
            "much as hours that decode.",
            "A CPU is right when the model is small (its weights are read in a few milliseconds), "
            "when few tokens are wanted, when nobody waits for the text (a batch overnight), when "
            "memory is what is short (RAM is cheap, and a model that does not fit one GPU needs "
            "two), or when the machine is there anyway: a test, a laptop, a branch office.",
            "A GPU is right when many streams of a model of a billion parameters and more are "
            "wanted at the same time, when prompts are long, or when one reader must not wait.",
        ),
        figure,
        "Dollars a month against tokens per second wanted, for a small and a large model.",
    )


def _speed(serving: Serving) -> float:
    return serving.tokens_per_s


def _crossing(material: Material, model: str, best: dict[str, Serving]) -> str:
    """From how many tokens/s on the cheapest GPU costs less than so many CPU machines."""
    cpus = [lane for lane in material.lanes if lane.is_measured and "cpu" in _devices(lane)]
    gpus = [lane for lane in material.lanes if lane not in cpus]
    if not cpus or not gpus:
        return ""
    cpu, gpu = cpus[0], min(gpus, key=lambda lane: lane.running.dollars_per_hour)
    machines = gpu.running.dollars_per_hour / cpu.running.dollars_per_hour
    crossing = machines * best[cpu.name].tokens_per_s
    if crossing > best[gpu.name].tokens_per_s:
        return f"{name_of(model)}: CPUs cost less at any demand."
    kind = "computed from its roof" if best[cpu.name].is_computed else "measured"
    return f"{name_of(model)}: CPUs ({kind}) cost less up to about {_rounded(crossing)} tokens/s."


def _rounded(value: float) -> str:
    """Two digits are what such a figure is good for."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def _devices(lane: Lane) -> set[str]:
    return {run.device for run in lane.runs.values()}
