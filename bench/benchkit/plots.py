"""The plots of the page, as SVG; left out, with a line that says so, where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchkit.records import Run

__all__ = ["draw"]

COLORS = {"qcompile": "#1a7f5a", "onnxruntime": "#b5651d", "float32 compiled": "#7a7a7a"}


def draw(runs: Mapping[str, Run], folder: Path) -> list[Path]:
    """Draw what there are figures for; the files, in the order in which the page shows them."""
    if importlib.util.find_spec("matplotlib") is None:
        print("skipped: no plots, matplotlib is not installed (pip install 'qcompile[bench]')", flush=True)
        return sorted(folder.glob("*.svg"))
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {"svg.hashsalt": "qcompile", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                "axes.spines.right": False, "axes.axisbelow": True}  # fmt: skip
    plots: dict[str, Callable[[Any, Mapping[str, Run]], Any]] = {
        "layers": _layers, "models": _models, "grid": _grid, "token_time": _token_time,
    }  # fmt: skip
    made = []
    with plt.rc_context(settings):
        for name, plot in plots.items():
            figure = plot(plt, runs)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            made.append(path)
    return made


def _layers(plt: Any, runs: Mapping[str, Run]) -> Any:
    """Milliseconds by rows: a panel a shape, int4 solid, int8 dashed."""
    if "layers" not in runs:
        return None
    records = [r for r in runs["layers"].records if r.engine in COLORS]
    shapes = list(dict.fromkeys(r.case["shape"] for r in records))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.1 * len(shapes), 3.0), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        kinds = dict.fromkeys((r.engine, r.case["scheme"]) for r in records if r.case["shape"] == shape)
        for engine, scheme in kinds:
            if engine == "float32 compiled" and scheme != next(iter(kinds))[1]:
                continue
            points = sorted((r.case["M"], r.value) for r in records
                            if (r.case["shape"], r.engine, r.case["scheme"]) == (shape, engine, scheme))  # fmt: skip
            label = engine if engine == "float32 compiled" else f"{engine} {scheme}"
            style = "-" if scheme.startswith("int4") or engine == "float32 compiled" else "--"
            axis.plot(*zip(*points, strict=True), style, color=COLORS.get(engine), marker=".", label=label)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="rows of x")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a layer")
    axes[0][-1].legend(fontsize=7, frameon=False)
    return figure


def _models(plt: Any, runs: Mapping[str, Run]) -> Any:
    """Bars: tokens a second of the language model, milliseconds of encoder and network."""
    panels = []
    for bench, key in (("language", "what"), ("encoder", "batch"), ("vision", "batch")):
        if bench in runs:
            for value in dict.fromkeys(r.case[key] for r in runs[bench].records):
                panels.append((bench, key, value))
    if not panels:
        return None
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(4.2 * -(-len(panels) // 2), 4.6), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (bench, key, value) in zip(axes.flat, panels, strict=False):
        found = [r for r in runs[bench].records if r.case[key] == value]
        names = [r.engine for r in found]
        ours = [name.startswith(("qcompile", "qint")) for name in names]
        bars = axis.barh(names, [r.value for r in found], color=[COLORS["qcompile"] if o else "#9aa4ad" for o in ours])
        axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axis.invert_yaxis()
        better = "less is better" if found[0].less_is_better else "more is better"
        axis.set_title(f"{bench}, {key} {value}" if key == "batch" else f"{bench}, {value}", fontsize=9)
        axis.set_xlabel(f"{found[0].unit}, {better}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return figure


def _grid(plt: Any, runs: Mapping[str, Run]) -> Any:
    """Times faster than float32, a dot a case."""
    if "grid" not in runs:
        return None
    records = runs["grid"].records
    plain = {tuple(r.case.values()): r.value for r in records if r.engine == "float32"}
    schemes = list(dict.fromkeys(r.case["scheme"] for r in records))
    figure, axis = plt.subplots(figsize=(6.4, 2.8))
    for i, scheme in enumerate(schemes):
        own = [r for r in records if r.engine == "qcompile" and r.case["scheme"] == scheme]
        places = [r.case["M"] * (1 + 0.18 * (i - (len(schemes) - 1) / 2)) for r in own]
        axis.plot(places, [plain[tuple(r.case.values())] / r.value for r in own], ".", alpha=0.7, label=scheme)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="rows of x", ylabel="times faster than float32")
    axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.3)
    return figure


def _token_time(plt: Any, runs: Mapping[str, Run]) -> Any:
    """One bar: the step, cut into its operators."""
    if "token_time" not in runs:
        return None
    whole = next(r.value for r in runs["token_time"].records if r.case["op"] == "one token")
    parts = [(r.case["op"], r.value) for r in runs["token_time"].records if r.case["op"] != "one token"]
    shown = [(name, value) for name, value in parts if value > 0.02 * whole]
    shown += [("small operators", sum(v for _, v in parts) - sum(v for _, v in shown))]
    shown += [("Python, guards, dispatch", max(whole - sum(v for _, v in parts), 0.0))]
    figure, axis = plt.subplots(figsize=(8.0, 1.5))
    left = 0.0
    for i, (name, value) in enumerate(shown):
        axis.barh([0], [value], left=left, color=plt.get_cmap("Set2")(i % 8), label=f"{name}: {value:.2f} ms")
        left += value
    axis.set_yticks([])
    axis.set_xlabel("ms of one token")
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    return figure
