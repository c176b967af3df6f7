"""How figures look: one look for all, readable on light and on dark.

Text, lines and grids are drawn in placeholder colours. PNGs keep them (they are a light theme); in
the page's SVGs they become CSS variables. Series have colours that both themes carry.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, FAINT, GRID, PAPER = "#1b1f24", "#6b7480", "#d9dde3", "#fefefe"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)", PAPER: "var(--paper)"}
# In the order devices take them; made to differ for colour-blind eyes too (after Okabe and Ito).
MEASURED_COLOURS = ("#d55e00", "#c9559a", "#b8860b", "#8c6bb1")
COMPUTED_COLOURS = ("#0b84c6", "#0a9d78", "#7a86c9")
PART_COLOURS = (
    *("#0b84c6", "#d55e00", "#0a9d78", "#c9559a"),
    *("#b8860b", "#7a86c9", "#8a8f98", "#5fb3d9", "#a15c3e"),
)
FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]
WIDTH_IN = 9.6
FEW_DECADES = 60.0  # a range in which powers of ten are too few ticks
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": FONTS,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 3.2,  # long enough for a dash and its mark
    "svg.fonttype": "none",
    "svg.hashsalt": "vitrine",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


mpl.rcParams.update(_RC)  # the report's process draws nothing else


def panels(count: int, *, rows: int = 1, height_in: float = 3.9) -> tuple[Figure, list[list[Axes]]]:
    """A figure with `rows` times `count` axes, and a strip at the foot for the legend."""
    figure, axes = pyplot.subplots(
        rows, count, figsize=(WIDTH_IN, height_in), squeeze=False, layout="constrained"
    )
    return figure, [list(row) for row in axes]


def title(axes: Axes, text: str) -> None:
    """Over its left corner."""
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One for all axes, under them; each label once."""
    found: dict[str, object] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def log_axes(
    axes: Axes, *, x: bool = True, y: bool = True, x_ticks: Sequence[float] | None = None
) -> None:
    """Logarithmic, with plain numbers (1,000, 2.5 M) and no minor clutter."""
    if x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks))
            axes.xaxis.set_minor_locator(NullLocator())
    if y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < FEW_DECADES:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float, _: object = None) -> str:
    """A number in few characters: 0.05, 12, 3,400, 1.2 M, 4 G, 7 T, 1 P."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def to_svg(figure: Figure, prefix: str) -> str:
    """For the page: colours by CSS variable, ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{prefix}-", text)
    # The page says how wide it is.
    return re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1">', text, count=1)


def to_png(figure: Figure, path: Path) -> None:
    """On paper."""
    figure.savefig(path, dpi=130)


def close(figure: Figure) -> None:
    """Forget it."""
    pyplot.close(figure)
