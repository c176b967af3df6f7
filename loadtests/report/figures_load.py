"""Speed against concurrency, and latency against load: what was served over HTTP."""

from __future__ import annotations

from loadtests.report import computed, style
from loadtests.report.drawing import Drawing, Material, name_of
from loadtests.report.lanes import Lane
from loadtests.report.records import Run, Served

CONCURRENCY = (1, 4, 16, 64, 256)


def throughput(material: Material) -> Drawing:
    """Tokens/s against users, with every device's roof."""
    models = material.served
    figure, ((*axes,),) = style.panels(len(models), height_in=4.3)
    for one, model in zip(axes, models, strict=True):
        needs = material.needs(model)
        for lane in material.lanes:
            run = lane.runs.get(model)
            served = None if run is None else run.served
            lengths = _lengths(material, model)
            roof = [
                computed.served_tokens_per_s(needs, lane.roof, users, *lengths)
                for users in CONCURRENCY
            ]
            word = "roof" if lane.is_measured else "roof, computed"
            one.plot(CONCURRENCY, roof, ":", color=lane.colour, label=f"{lane.name}: {word}")
            if served is None or run is None:
                continue
            users = [closed.users for closed in served.closed]
            speed = [closed.point.tokens_per_s for closed in served.closed]
            one.plot(users, speed, "o-", color=lane.colour, label=f"{lane.label}, served")
            one.plot(
                [offline.batch for offline in run.offline],
                [offline.decode_tokens_per_s for offline in run.offline],
                "D",
                mfc="none",
                color=lane.colour,
                label=f"{lane.name}: engine alone, decoding",
            )
        style.log_axes(one, x_ticks=CONCURRENCY)
        style.title(one, name_of(model))
        one.set_xlabel("requests at the same time")
    axes[0].set_ylabel("tokens/s, all streams together")
    style.legend(figure, axes, columns=2)
    return Drawing(
        "throughput",
        "Speed against concurrency",
        _throughput_claim(material, models),
        (
            "One decode step multiplies one row for each sequence with every weight matrix: Q, K "
            "and V, the output product and the MLP. The weights are read once a step, whether "
            "one row waits for them or a hundred, so a second sequence costs next to nothing "
            "until the device computes as fast as it reads. The dotted roofs bend there: early on "
            "a CPU, whose arithmetic is slow, late on a GPU.",
            "What batching does not share is softmax(QKᵀ/√d)V: each sequence has keys and values "
            "of its own, and reads them alone. Their bytes grow with the number of sequences and "
            "with their length, and the roofs rise less and less.",
            "Roofs count every weight, key and value once and nothing else, and prompts too: no "
            "program can be faster, and real ones are slower. Dots below a roof are what is lost "
            "to the program, to HTTP, and to a client on the same machine.",
        ),
        figure,
        "Tokens per second against the number of requests at the same time, for each model.",
    )


def _lengths(material: Material, model: str) -> tuple[int, int]:
    for run in material.runs:
        if run.model == model and run.served is not None:
            return run.served.prompt_len, run.served.output_len
    return 128, 128


def _throughput_claim(material: Material, models: list[str]) -> str:
    for lane in material.own():
        run = lane.runs.get(models[-1])
        if run is None or run.served is None:
            continue
        closed = run.served.closed
        one, most = closed[0].point.tokens_per_s, max(x.point.tokens_per_s for x in closed)
        return (
            f"{name_of(models[-1])} on {lane.name}: {style.short(one)} tokens/s for one request, "
            f"{style.short(most)} for many at the same time, {most / one:.1f} times as many. "
            "Batching is what a server lives by."
        )
    return "Batching is what a server lives by."


def latency(material: Material) -> Drawing:
    """TTFT and inter-token latency against the rate of arrivals, and where the SLO breaks."""
    pairs = [
        (model, lane)
        for model in material.served
        for lane in material.own()
        if (run := lane.runs.get(model)) is not None and run.served is not None
    ][:3]
    figure, axes = style.panels(len(pairs), rows=2, height_in=5.6)
    for column, (model, lane) in enumerate(pairs):
        served = _served(lane.runs[model])
        panel = (axes[0][column], axes[1][column])
        rates = [one.rate for one in served.open]
        for one, name, limit_s in (
            (panel[0], "ttft", served.ttft_slo_s),
            (panel[1], "itl", served.tpot_slo_s),
        ):
            spreads = [getattr(open_.point, name) for open_ in served.open]
            for cut, line, word in (("p50_s", "o-", "p50"), ("p99_s", "o--", "p99")):
                times = [1e3 * (getattr(spread, cut) or float("nan")) for spread in spreads]
                one.plot(rates, times, line, color=lane.colour, label=word)
            one.axhline(1e3 * limit_s, color=style.INK, lw=1.1, ls=(0, (6, 3)), label="SLO")
            if served.goodput is not None:
                one.axvline(served.goodput, color="#0a9d78", lw=1.4, label="goodput")
            if served.broke_at is not None:
                one.axvspan(served.broke_at, max(rates) * 1.15, color="#d55e00", alpha=0.09, lw=0)
            style.log_axes(one, x=False)
            one.set_xlim(0, max(rates) * 1.08)
        style.title(panel[0], f"{name_of(model)}, {lane.name}")
        panel[1].set_xlabel("requests/s, at random moments")
    axes[0][0].set_ylabel("time to first token, ms")
    axes[1][0].set_ylabel("between tokens, ms")
    style.legend(figure, [axes[0][0]], columns=5)
    return Drawing(
        "latency",
        "Latency against load",
        _latency_claim(pairs),
        (
            "Requests come at random moments, whether or not the server keeps up (an open loop). "
            "Below the goodput, 99 in 100 requests meet both limits; in the tinted part they do "
            "not. The break is sudden: past the rate at which steps get done, a queue grows for as "
            "long as the load lasts, and time to first token is mostly waiting.",
            "Time to first token is a product of the whole prompt with every matrix, QKᵀ of every "
            "token with every other included: it is arithmetic, and batching does not help it. "
            "The time between tokens is the time of a step: reading the weights once and every "
            "sequence's keys and values.",
            "The limit between tokens is held against each request's mean after its first token; "
            "the curves are all pauses that readers saw.",
        ),
        figure,
        "Time to first token and between tokens, median and 99th percentile, against arrivals.",
    )


def _served(run: Run) -> Served:
    if run.served is None:
        raise ValueError(f"{run.model} was not served")
    return run.served


def _latency_claim(pairs: list[tuple[str, Lane]]) -> str:
    said = []
    for model, lane in pairs:
        served = _served(lane.runs[model])
        limits = (
            f"TTFT within {1e3 * served.ttft_slo_s:g} ms and {1e3 * served.tpot_slo_s:g} ms a token"
        )
        if served.goodput is None:
            said.append(f"{name_of(model)} on {lane.name} met {limits} at no rate that was tried")
        else:
            sent = next(x.point.requests for x in served.open if x.rate == served.goodput)
            said.append(
                f"{name_of(model)} on {lane.name} keeps {limits} for 99 in 100 up to "
                f"{served.goodput:.2g} requests/s ({sent} were sent at that rate)"
            )
    return "; ".join(said) + "."
