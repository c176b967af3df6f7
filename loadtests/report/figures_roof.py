"""The roofline, and the bytes behind it."""

from __future__ import annotations

from loadtests.report import computed, style
from loadtests.report.drawing import LARGE, Drawing, Material, name_of
from service.engine.traffic import Traffic

BATCHES = (1, 8, 32, 256)
CONTEXT = 512
PROMPT = 512


def roofline(material: Material) -> Drawing:
    """Operations per second against operations per byte."""
    model = material.served[-1] if material.served else LARGE
    needs = material.needs(model)
    context = min(CONTEXT, _context(material, model))
    figure, ((axes,),) = style.panels(1, height_in=4.9)
    intensities = [computed.decode_intensity(needs, batch, context) for batch in BATCHES]
    at_prefill = computed.prefill_intensity(needs, context)
    left, right = (
        0.5,
        max(2 * at_prefill, 2.2 * max(computed.ridge(x.roof) for x in material.lanes)),
    )
    for lane in material.lanes:
        ridge = computed.ridge(lane.roof)
        top = lane.roof.flops_per_s
        xs, ys = [left, ridge, right], [left * lane.roof.read_bytes_per_s, top, top]
        axes.plot(xs, ys, color=lane.colour, label=lane.label, ls="-" if lane.is_measured else ":")
        for places, mark in ((intensities, "o"), ([at_prefill], "s")):
            heights = [min(top, place * lane.roof.read_bytes_per_s) for place in places]
            axes.plot(places, heights, mark, color=lane.colour, mfc="none")
        run = lane.runs.get(model)
        for offline in [] if run is None else run.offline:
            place, flops = _achieved(needs, offline.batch, context, offline.decode_tokens_per_s)
            axes.plot([place], [flops], "o", color=lane.colour)
    style.log_axes(axes)
    axes.set_xlim(left, right)
    low = min(left * lane.roof.read_bytes_per_s for lane in material.lanes)
    axes.set_ylim(low / 2, 90 * max(lane.roof.flops_per_s for lane in material.lanes))
    for place, word in [
        *((x, f"decode, batch {batch}") for x, batch in zip(intensities, BATCHES, strict=True)),
        (at_prefill, f"prefill of {context}"),
    ]:
        axes.axvline(place, color=style.FAINT, lw=0.7, ls=(0, (2, 3)))
        axes.annotate(
            word,
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8.5,
        )
    axes.set_xlabel("arithmetic intensity, operations for each byte read")
    axes.set_ylabel("operations/s")
    style.legend(figure, [axes], columns=2)
    lane = material.lanes[0]
    return Drawing(
        "roofline",
        "The roofline",
        f"Decoding one sequence of {name_of(model)} does {intensities[0]:.1f} operations for each "
        f"byte it reads; {lane.name} could do {computed.ridge(lane.roof):.0f}, an H100 "
        f"{computed.ridge(_h100(material)):.0f}. One stream uses none of what a GPU's "
        "arithmetic was paid for; what it buys is bandwidth.",
        (
            "A weight in bfloat16 is two bytes and takes part in one multiplication and one "
            "addition for each row: one operation a byte at batch 1, 256 at batch 256, if weights "
            "were all. On the slope a device is as fast as its memory, on the flat part as fast as "
            "its arithmetic. Open marks are where work lands on each roof; filled ones were "
            "measured, the engine alone.",
            "QKᵀ over the cache never climbs: each key is read for its own sequence, and takes "
            "part in two operations for each query head that shares it, whatever the batch. It "
            f"pulls decode of 256 at a context of {context} down to {intensities[-1]:.0f} "
            "operations a byte, and further the longer the context.",
            "Prefill multiplies all rows of a prompt with the weights at once, and stands on the "
            "flat part of every roof, or near it: there the ratio of arithmetic is what counts, "
            "not that of memory.",
        ),
        figure,
        "Roofline of each device with decode at several batch sizes and prefill.",
    )


def _achieved(needs: Traffic, batch: int, context: int, tokens_per_s: float) -> tuple[float, float]:
    num_bytes, flops = needs.decode([context] * batch)
    return flops / num_bytes, flops / batch * tokens_per_s


def _context(material: Material, model: str) -> int:
    config = material.config(model)
    return int(str(config.get("max_position_embeddings") or config.get("n_positions") or CONTEXT))


def _h100(material: Material) -> computed.Roof:
    from loadtests.report.hardware import H100

    found = [lane.roof for lane in material.lanes if "H100" in lane.name]
    return found[0] if found else H100.roof


def bytes_per_token(material: Material) -> Drawing:
    """What batching divides, and what it does not."""
    models = [material.served[-1] if material.served else "gpt2", LARGE]
    batches = [2**n for n in range(9)]
    figure, ((*axes,),) = style.panels(len(models), height_in=3.9)
    for one, model in zip(axes, models, strict=True):
        needs = material.needs(model)
        weights = [needs.weight_bytes / batch for batch in batches]
        one.plot(batches, weights, "o-", color=style.PART_COLOURS[0], label="weights")
        limit = _context(material, model)
        for context, colour in ((512, 1), (4096, 3)):
            if context > limit:
                continue
            cache = needs.decode([context])[0] - needs.weight_bytes
            label = f"keys and values at a context of {context:,}"
            one.plot(batches, [cache] * 9, "-", color=style.PART_COLOURS[colour], label=label)
        style.log_axes(one, x_ticks=batches[::2])
        style.title(one, name_of(model))
        one.set_xlabel("sequences in a step")
    axes[0].set_ylabel("bytes read for each token")
    style.legend(figure, axes, columns=3)
    needs = material.needs(LARGE)
    cache = needs.decode([4096])[0] - needs.weight_bytes
    return Drawing(
        "bytes",
        "Bytes for each token",
        f"{name_of(LARGE)} reads {needs.weight_bytes / 1e9:.1f} GB of weights for a lone token and "
        f"{needs.weight_bytes / 64e6:.0f} MB in a batch of 64; its keys and values at a context "
        f"of 4,096 are {cache / 1e6:.0f} MB for each token, in any batch.",
        (
            "XW for all sequences of a step reads W once: its bytes are shared, and fall as "
            "1/batch. QKᵀ and the sum with V read the sequence's own keys and values: nothing is "
            "shared. Where the lines cross, a larger batch stops paying.",
            "Fewer KV heads than query heads (grouped-query attention) push the crossing to the "
            "right, which is why recent models have them.",
        ),
        figure,
        "Bytes of weights and of keys and values for each token against the batch size.",
    )
