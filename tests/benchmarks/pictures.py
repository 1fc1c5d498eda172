"""
Results as pictures: a row of small bar charts for each column, and lines for growth.

Our own server is blue, the others are grey; the numbers stand at the bars, so there are no axes
to read them from.  What is possible without a proxy stands under the title, not
among the bars, which it would dwarf.  The same results make the same file, octet by octet.

This is the only file that needs matplotlib, and it is imported only to draw.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, Tuple

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

from .measures import COLUMNS, FAILURES, Column
from .results import Results
from .rounds import DIRECT, OURS
from .tables import anybody_has, digits, sizes

BLUE, INK, SOFT, PALE = "#0067a5", "#222222", "#6b6b6b", "#c3c3c3"
GREYS = ("#3f3f3f", "#6f6f6f", "#8f8f8f", "#a9a9a9")        # of lines; their dashes differ as well
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDTH = 9.6                 # inches; 72 points each
PANELS = {"rate": "Messages", "p99": "Latency", "kib": "Memory"}
NO_PROXY = "no proxy"
STAR = "*"
FAR_APART = 20              # times the smallest, and a linear scale would show nothing but the largest
APART = 0.1               # of the height of a panel, between two names
STYLE: Dict[Any, Any] = {
    "svg.hashsalt": "socks5srv",        # or ids would be random
    "svg.fonttype": "none",             # text stays text: small files, and small differences
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "font.size": 10,
    "text.color": INK, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}

Measured = Dict[str, Dict[str, Any]]        # numbers by server


def draw(results: Results, folder: str) -> List[str]:
    """Write FOLDER/COLUMN.svg for every column that has been measured; the paths."""
    os.makedirs(folder, exist_ok=True)
    paths = []
    for name, column in COLUMNS.items():
        measured = {server: columns[name] for server, columns in results.items() if name in columns}
        with matplotlib.rc_context(STYLE):
            figure = lines(column, measured) if name == "growth" else bars(column, measured)
            if figure:
                paths.append(os.path.join(folder, f"{name}.svg"))
                figure.savefig(paths[-1], metadata={"Date": None, "Creator": None})
                pyplot.close(figure)
    return paths


# --- bars ---

def bars(column: Column, measured: Measured) -> Any:
    """Small bar charts side by side, one for each number; None if there is nothing to draw."""
    keys = [key for key in column.drawn if anybody_has(key, without_direct(measured))]
    if not keys:
        return None
    servers = in_order(column, keys, measured)
    failed = any(measured[server].get(FAILURES) for server in servers)
    foot = 0.4 if failed else 0.12
    height = 0.88 + foot + 0.30 * len(servers)
    figure, row = pyplot.subplots(1, len(keys), figsize=(WIDTH, height), sharey=True, squeeze=False)
    for axes, key in zip(row[0], keys):
        chart(axes, column, key, servers, measured)
    row[0][0].set_yticks(range(len(servers)))
    row[0][0].set_yticklabels(servers)
    for label, server in zip(row[0][0].get_yticklabels(), servers):
        label.set(**writing(server))
    margin = (0.25 + 0.088 * max(map(len, servers))) / WIDTH
    figure.subplots_adjust(left=margin, right=0.985, top=1 - 0.85 / height, bottom=foot / height, wspace=0.12)
    if failed:
        figure.text(margin, 0.12 / height, f"{STAR} some of it has failed: see the table", color=SOFT, fontsize=9)
    return figure


def in_order(column: Column, keys: List[str], measured: Measured) -> List[str]:
    """The best first, by the first number that is drawn."""
    servers = [server for server in measured if server != DIRECT]
    quantity, _situation = column.describe(keys[0])
    nothing = float("-inf") if quantity.more_is_better else float("inf")
    return sorted(servers, key=lambda server: measured[server].get(keys[0], nothing), reverse=quantity.more_is_better)


def chart(axes: Axes, column: Column, key: str, servers: List[str], measured: Measured) -> None:
    __quantity, situation = column.describe(key)
    values = [measured[server].get(key) for server in servers]
    most = max((value for value in values if value is not None), default=1) or 1
    for place, (server, value) in enumerate(zip(servers, values)):
        if value is not None:
            axes.barh(place, value, 0.68, color=BLUE if server == OURS else PALE)
        failed = STAR if measured[server].get(FAILURES) else ""
        text = ("none" if value is None else digits(value)) + failed
        axes.text((value or 0) + 0.02 * most, place, text, va="center", **writing(server))
    axes.set_xlim(0, 1.34 * most)
    axes.set_ylim(len(servers) - 0.4, -0.6)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(PALE)
    annotate(axes, situation, 1, (0, 30), fontweight="bold", fontsize=11)
    annotate(axes, unit(column, key), 1, (0, 17), color=SOFT, fontsize=9)
    straight = measured.get(DIRECT, {}).get(key)
    if straight is not None:
        annotate(axes, f"without a proxy {digits(straight)}", 1, (0, 5), color=SOFT, fontsize=9)


def writing(server: str) -> Dict[str, Any]:
    """How the text of a server looks."""
    return {"color": BLUE, "fontweight": "bold"} if server == OURS else {"color": INK}


def unit(column: Column, key: str) -> str:
    quantity, _situation = column.describe(key)
    what = quantity.unit if quantity.title == "rate" else f"{quantity.title} in {quantity.unit}"
    return f"{what}, {'more' if quantity.more_is_better else 'less'} is better"


def annotate(axes: Axes, text: str, height: float, offset: Tuple[int, int], x: int = 0, **look: Any) -> None:
    """A text beside the panel: at this part of its height, so many points away."""
    axes.annotate(text, (x, height), offset, xycoords="axes fraction", textcoords="offset points", **look)


# --- lines ---

def lines(column: Column, measured: Measured) -> Any:
    """How messages, latency and memory go with the number of tunnels; None if there is nothing to draw."""
    quantities = [quantity for quantity in PANELS if sizes(quantity, without_direct(measured))]
    if not quantities:
        return None
    height = 0.6 + 2.1 * len(quantities)
    figure, rows = pyplot.subplots(len(quantities), 1, figsize=(WIDTH, height), squeeze=False, sharex=True)
    for (axes,), quantity in zip(rows, quantities):
        plot(axes, column, quantity, measured if quantity != "kib" else without_direct(measured))
    axes.set_xlabel("open tunnels, of which 10 are busy", fontsize=9)
    names = 0.25 + 0.08 * max(map(len, [*measured, NO_PROXY]))
    figure.subplots_adjust(left=0.65 / WIDTH, right=1 - names / WIDTH, top=1 - 0.4 / height, bottom=0.5 / height, hspace=0.3)
    return figure


def without_direct(measured: Measured) -> Measured:
    return {server: numbers for server, numbers in measured.items() if server != DIRECT}


def plot(axes: Axes, column: Column, quantity: str, measured: Measured) -> None:
    """A line for each server, with its name at the end."""
    others = [server for server in measured if server not in (OURS, DIRECT)]
    keys = sizes(quantity, measured)
    ends: Dict[str, float] = {}
    for server, numbers in measured.items():
        points = [(int(key.partition("_")[2]), numbers[key]) for key in keys if key in numbers]
        if points:
            look = stroke(server, others)
            axes.plot(*zip(*points), **look)
            axes.plot(*points[-1], "o", markersize=4.5, color=look["color"], zorder=4, clip_on=False)
            ends[server] = points[-1][1]
    scale(axes, [int(key.partition("_")[2]) for key in keys], [numbers[key] for numbers in measured.values() for key in keys if numbers.get(key)])
    label_ends(axes, ends, others)
    annotate(axes, PANELS[quantity], 1, (0, 10), fontweight="bold", fontsize=11)
    annotate(axes, unit(column, keys[0]), 1, (72, 10), color=SOFT, fontsize=9)


def stroke(server: str, others: List[str]) -> Dict[str, Any]:
    if server == OURS:
        return {"color": BLUE, "linewidth": 2.6, "zorder": 3}
    if server == DIRECT:
        return {"color": PALE, "linewidth": 1.6}
    turn = others.index(server)
    return {"color": GREYS[turn % len(GREYS)], "linewidth": 1.6, "linestyle": DASHES[(turn + turn // len(GREYS)) % len(DASHES)]}


def scale(axes: Axes, counts: List[int], values: List[float]) -> None:
    """The numbers that were measured along x; along y as few as will do."""
    axes.set_xscale("log")
    axes.set_xlim(counts[0] * 0.92, counts[-1] * 1.02)
    axes.set_xticks(counts)
    axes.set_xticklabels([f"{count:,}" for count in counts])
    axes.minorticks_off()
    if max(values) > FAR_APART * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if max(values) > 100 * min(values) else (1.0, 3.0)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.set_ylim(0, 1.05 * max(values))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _place: f"{value:,g}"))
    axes.tick_params(axis="both", length=3, labelsize=9, color=PALE, labelcolor=SOFT)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def label_ends(axes: Axes, ends: Dict[str, float], others: List[str]) -> None:
    """Names at the ends of their lines, moved apart where they would touch."""
    heights = {server: axes.transAxes.inverted().transform(axes.transData.transform((1, value)))[1] for server, value in ends.items()}
    for server, height in moved_apart(heights).items():
        look = writing(server) if server == OURS else {"color": SOFT if server == DIRECT else stroke(server, others)["color"]}
        name = NO_PROXY if server == DIRECT else server
        annotate(axes, name, height, (9, 0), x=1, va="center", fontsize=9, annotation_clip=False, **look)


def moved_apart(heights: Dict[str, float]) -> Dict[str, float]:
    """Where the names go: those that would touch become a group around the middle of its members."""
    def lowest(group: List[str]) -> float:
        return max(0.0, sum(heights[server] for server in group) / len(group) - APART * (len(group) - 1) / 2)

    groups: List[List[str]] = []
    for server in sorted(heights, key=lambda server: heights[server]):
        groups.append([server])
        while len(groups) > 1 and lowest(groups[-1]) < lowest(groups[-2]) + APART * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {server: lowest(group) + APART * place for group in groups for place, server in enumerate(group)}
