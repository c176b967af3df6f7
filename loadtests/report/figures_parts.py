"""Where a step's time goes, and what the limits of the server do."""

from __future__ import annotations

from loadtests.report import style
from loadtests.report.drawing import Drawing, Material, name_of
from loadtests.report.records import Limits, Run

ORDER = (
    *("embedding", "Q, K, V products", "attention", "output product", "MLP", "head"),
    *("norms, residuals, threads", "sampling", "host"),
)
MIN_SHARE = 0.06  # narrower parts get no number


def where(material: Material) -> Drawing:
    """A bar for each model, device and batch; its length is the whole step."""
    rows = [
        (run, one)
        for lane in material.own()
        for model in material.models
        if (run := lane.runs.get(model)) is not None
        for one in run.where
    ]
    figure, ((axes,),) = style.panels(1, height_in=1.5 + 0.46 * len(rows))
    labels = []
    for place, (run, one) in enumerate(rows):
        whole, left = sum(one.seconds.values()), 0.0
        for part, colour in zip(ORDER, style.PART_COLOURS, strict=True):
            share = one.seconds.get(part, 0.0) / whole
            axes.barh(place, share, left=left, color=colour, height=0.66, label=part)
            if share >= MIN_SHARE:
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="#ffffff",
                )
            left += share
        axes.text(1.01, place, f"{1e3 * whole:.3g} ms", va="center", fontsize=9)
        labels.append(f"{name_of(run.model)}, batch {one.batch}\n{run.host.name[:26]}")
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(visible=False, axis="y")
    style.legend(figure, [axes], columns=5)
    methods = " and ".join(dict.fromkeys(one.method for _, one in rows))
    return Drawing(
        "where",
        "Where a decode step's time goes",
        _where_claim(rows),
        (
            "At batch 1 every product is one row times a matrix, and a part takes as long as its "
            "weights take to read: the MLP has most of them, and in a small model the head, "
            "vocabulary times width. In a batch the products grow slowly, since the weights are "
            "still read once, and softmax(QKᵀ/√d)V grows with every sequence.",
            f"How they were timed: {methods}. Sampling draws from the logits; host is the engine's "
            "Python: scheduling, building the batch, booking tokens.",
        ),
        figure,
        "Shares of a decode step by part, for each model, device and batch size.",
    )


def _where_claim(rows: list[tuple[Run, object]]) -> str:
    if not rows:
        return ""
    run, one = rows[-1]
    seconds: dict[str, float] = one.seconds  # type: ignore[attr-defined]
    part = max(ORDER, key=lambda name: seconds.get(name, 0.0))
    share = seconds[part] / sum(seconds.values())
    return (
        f"In a step of {name_of(run.model)} at batch {one.batch}, {part} takes most: "  # type: ignore[attr-defined]
        f"{share:.0%}."
    )


def limits(material: Material) -> Drawing | None:
    """What --max-num-seqs and --max-batched-tokens do to speed and pauses; None: not measured."""
    measured = [run for run in material.runs if run.limits]
    if not measured:
        return None
    run = measured[0]
    figure, axes = style.panels(2, rows=2, height_in=5.4)
    common = max({one.max_batched_tokens for one in run.limits}, key=_count(run, "tokens"))
    by_seqs = [one for one in run.limits if one.max_batched_tokens == common]
    seqs = max({one.max_num_seqs for one in run.limits}, key=_count(run, "seqs"))
    by_tokens = [one for one in run.limits if one.max_num_seqs == seqs]
    for column, (chosen, name, default) in enumerate(
        ((by_seqs, "max_num_seqs", 64), (by_tokens, "max_batched_tokens", 1024))
    ):
        chosen = sorted(chosen, key=lambda one: getattr(one, name))
        x = [getattr(one, name) for one in chosen]
        speed, pause = axes[0][column], axes[1][column]
        colour = style.MEASURED_COLOURS[0]
        speed.plot(x, [one.point.tokens_per_s for one in chosen], "o-", color=colour)
        for cut, line in (("p50_s", "o-"), ("p99_s", "o--")):
            for kind, own in (("ttft", style.PART_COLOURS[0]), ("itl", style.PART_COLOURS[3])):
                times = [
                    1e3 * (getattr(getattr(o.point, kind), cut) or float("nan")) for o in chosen
                ]
                word = {"ttft": "time to first token", "itl": "between tokens"}[kind]
                pause.plot(x, times, line, color=own, label=f"{word}, {cut[:3]}")
        for one in (speed, pause):
            one.axvline(default, color=style.FAINT, lw=1, ls=(0, (3, 3)), label="default")
            style.log_axes(one, y=one is pause, x_ticks=x)
        speed.set_ylim(bottom=0)
        style.title(speed, f"--{name.replace('_', '-')}")
        pause.set_xlabel(f"--{name.replace('_', '-')}")
    axes[0][0].set_ylabel("tokens/s")
    axes[1][0].set_ylabel("ms")
    style.legend(figure, [axes[1][0]], columns=5)
    best = max(run.limits, key=lambda one: one.point.tokens_per_s)
    return Drawing(
        "limits",
        "The server's limits",
        f"{name_of(run.model)} under {run.limits[0].users} users: most tokens/s at --max-num-seqs "
        f"{best.max_num_seqs} --max-batched-tokens {best.max_batched_tokens}, "
        f"{style.short(best.point.tokens_per_s)}.",
        (
            "More sequences in a step share the reading of the weights, until arithmetic or the "
            "keys and values are what takes the time; beyond, requests wait less for their first "
            "token and longer between tokens. A larger budget of tokens prefills prompts in fewer "
            "steps, each of which all running streams wait for.",
        ),
        figure,
        "Tokens per second and latencies against the two limits of the server.",
    )


def _count(run: Run, which: str) -> object:
    """How many measurements have a value: the one that was held still has most."""

    def count(value: int) -> int:
        return sum(_value(one, which) == value for one in run.limits)

    return count


def _value(one: Limits, which: str) -> int:
    return one.max_batched_tokens if which == "tokens" else one.max_num_seqs
