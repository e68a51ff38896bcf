"""Draws curves and bar charts of runs, as PNG files or as SVG that takes its colour of text from the page around it."""

import io
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot

matplotlib.use("Agg")
COLOURS = ("#3b76d9", "#d97a2b", "#2a9d6f", "#b14fc0", "#c9423f", "#7a6a55", "#1f9bb5", "#8a8f2c")  # readable on white and on black
GREY = "#a3a8b0"
INK = "#7f8081"  # as_svg replaces it by the page's colour of text
POINTS = 400  # most points drawn of a curve; more would not be visible
SMOOTH = 1 / 40  # share of a run's steps over which the running mean goes


class Curve(NamedTuple):
    """One line of a chart: a metric of a run over its steps."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    dashed: bool = False  # for a second metric of the same run
    sparse: bool = False  # measured only now and then, so its points are marked


def draw(title: str, curves: list[Curve], log_scale: bool = False):
    """Returns a matplotlib figure of curves over steps. Long curves are drawn faint, with their running mean on top."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    for curve in curves:
        style = {"color": curve.colour, "linestyle": "--" if curve.dashed else "-", "label": curve.label}
        if curve.sparse and curve.dashed:  # validations beside training: a line between the few points would read like a curve
            axes.plot(curve.steps, curve.values, "o", markersize=5, color=curve.colour, markeredgecolor="white", label=curve.label)
            continue
        if curve.sparse or len(curve.steps) < 20:
            axes.plot(curve.steps, curve.values, marker="o", markersize=4, linewidth=1.6, **style)
            continue
        steps, values = thinned(curve.steps, curve.values)
        axes.plot(steps, values, color=curve.colour, linewidth=0.7, alpha=0.3)
        axes.plot(steps, smoothed(values, max(1, round(len(values) * SMOOTH))), linewidth=1.6, **style)
    _dress(axes, title)
    axes.set_xlabel("step", color=INK, fontsize=9)
    if log_scale and all((curve.values[np.isfinite(curve.values)] > 0).all() for curve in curves):
        axes.set_yscale("log")
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    if len(curves) > 1:
        legend = axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        legend.set_zorder(5)
    return figure


def bars(title: str, results: dict[str, dict[str, dict]]):
    """Returns a figure that compares models, with intervals: `{model: {metric: {value, low, high}}}`, from 0 to 1; the first is in grey."""
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    low = {metric for values in results.values() for metric, cell in values.items() if cell.get("lower_is_better")}
    figure, axes = pyplot.subplots(figsize=(max(6.4, 1.6 * len(metrics)), 3.6), layout="constrained")
    width = 0.8 / len(results)
    for number, ((model, values), colour) in enumerate(zip(results.items(), (GREY, *COLOURS), strict=False)):
        there = [(place, values[metric]) for place, metric in enumerate(metrics) if metric in values]
        heights = [100 * one["value"] for _, one in there]
        errors = [
            [max(0.0, 100 * (one["value"] - one["low"])) for _, one in there],
            [max(0.0, 100 * (one["high"] - one["value"])) for _, one in there],
        ]
        places = [place + (number - (len(results) - 1) / 2) * width for place, _ in there]
        drawn = axes.bar(places, heights, 0.9 * width, yerr=errors, label=model, color=colour, capsize=2, ecolor=INK)
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7, color=INK)
    axes.set_xticks(
        range(len(metrics)),
        [metric.replace("_", " ") + "\n(lower is better)" * (metric in low) for metric in metrics],
    )
    axes.set_ylim(0, 115)
    axes.set_ylabel("%", color=INK, fontsize=9)
    _dress(axes, title)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=len(results), loc="upper right")
    return figure


def _dress(axes, title: str) -> None:
    """Set the title, and draw axes and numbers in INK."""
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points, so that at most POINTS are left; leaves out values that are not finite."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= POINTS:
        return steps, values
    edges = np.linspace(0, len(values), POINTS + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(values)])
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the running mean: of each value and the up to `width` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def save_png(figure, path: Path) -> None:
    """Write a figure to a PNG file, on white."""
    figure.savefig(path, dpi=150, facecolor="white")


def as_svg(figure, name: str) -> str:
    """Returns an <svg> element to put into a page: no background, INK as the page's colour of text, ids that begin with `name`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', svg, count=1)


def close(figure) -> None:
    pyplot.close(figure)
