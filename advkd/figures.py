"""Figures and tables: grids, curves, and the only writers of the figures folder."""

import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from advkd.files import locked, make_folder, project_root, read_object, write_atomic, write_json, write_text
from advkd.presets import UserError, config_hash

DPI = 110
COMPARABLE = ("extractor", "unseen", "teacher_fingerprint", "images", "sampling_seed", "fd_train_subset")
INK, PAPER_RECIPE, IMPROVED_RECIPE, TEACHER = "#333333", "#c8553d", "#2a6f97", "#7a7a7a"
COLOURS = {"paper": PAPER_RECIPE, "improved": IMPROVED_RECIPE, "teacher": TEACHER}
MARKERS = "os^DvP*X<>phH"  # of methods


def start_notebook() -> None:
    """Work from the checkout's root, wherever the notebook was started, and set the look of every figure."""
    os.chdir(project_root())
    warnings.filterwarnings("ignore", category=FutureWarning)
    sns.set_theme("notebook", "whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})


def show_images(ax: Axes, images: Tensor, columns: int, title: str = "") -> None:
    """Draw images `(n, c, h, w)` in [-1, 1] as a grid with `columns` columns."""
    grid = make_grid(images.detach().float().cpu().clamp(-1, 1) / 2 + 0.5, columns, padding=1, pad_value=0.75)
    ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=9)


def png(images: Tensor, columns: int, side_px: int) -> bytes:
    """Images `(n, c, h, w)` in [-1, 1] as a PNG grid of `side_px` or more a side, each pixel a square of several."""
    file = io.BytesIO()
    grid = make_grid(images.detach().float().cpu().clamp(-1, 1) / 2 + 0.5, columns, padding=1, pad_value=1)
    times = max(1, 2 * side_px // grid.shape[-1])  # sharp on screens of twice the density too
    save_image(F.interpolate(grid[None], scale_factor=times, mode="nearest"), file, format="png")
    return file.getvalue()


def show_strip(rows: dict[str, Sequence[Tensor]], columns: Sequence[str], side_px: int) -> Figure:
    """Rows of single images `(c, h, w)` of any size in [-1, 1], each drawn `side_px` wide under its column's label."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(0.82 * len(columns) + 0.9, 0.98 * len(rows)), squeeze=False
    )
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=True):
            show_images(ax, F.interpolate(image[None].float().cpu(), side_px, mode="nearest"), 1)
        row[0].text(-0.15, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    for ax, label in zip(axes[0], columns, strict=True):
        ax.set_title(label, fontsize=8, loc="center")
    figure.subplots_adjust(
        left=0.9 / (0.82 * len(columns) + 0.9) + 0.02, right=0.995, bottom=0.01, wspace=0.06, hspace=0.08
    )
    return figure


def plot_curves(records: Iterable, fields: dict[str, str], window: int = 25, figure: Figure | None = None) -> Figure:
    """One panel per field of the records (a running mean over `window` records) against images seen.

    `fields` maps a field's name to its axis label. Where there are several stages, the later ones are darker.
    """
    frame = pd.DataFrame(asdict(record) for record in records)
    stages = sorted(frame.stage.unique())
    several = len(stages) > 1
    colours = sns.color_palette("crest", len(stages)) if several else [IMPROVED_RECIPE]
    figure = figure or plt.figure(figsize=(2.9 * len(fields), 2.5))
    figure.clear()
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        for stage, colour in zip(stages, colours, strict=True):
            part = frame[frame.stage == stage].dropna(subset=[field])
            smooth = part[field].rolling(window, min_periods=1).mean()
            label_of = f"stage {stage}" if several and stage in (stages[0], stages[-1]) else None
            ax.plot(part.images_seen / 1000, smooth, lw=1.2, color=colour, label=label_of)
        ax.set(xlabel="images seen (thousands)", title=label)
    if several:
        axes[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    return figure


def live_curves(records: Generator, fields: dict[str, str], every: int = 500) -> list:
    """Consume `records`, redrawing their curves in the notebook every `every` records; returns them all."""
    from IPython.display import display

    seen, figure, handle = [], plt.figure(figsize=(2.9 * len(fields), 2.5)), None
    plt.close(figure)  # shown by its handle alone
    with closing(records):  # an interrupt while it draws ends the training too, which holds its folder
        for record in records:
            seen.append(record)
            if len(seen) % every == 0:
                plot_curves(seen, fields, figure=figure)
                handle = handle or display(figure, display_id=True)
                handle.update(figure)
    return seen


def figures_folder(folder: Path | str) -> Path:
    """Where `folder` lies: below ADVKD_FIGURES if that is set, so that a test run leaves the figures as they are."""
    return Path(os.environ.get("ADVKD_FIGURES", ".")) / folder


def save_figure(figure: Figure, folder: Path | str, name: str) -> Path:
    """Write `<folder>/<name>.png`, atomically."""
    path = figures_folder(folder) / f"{name}.png"
    write_atomic(
        path, lambda temporary: figure.savefig(temporary, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    )
    return path


def save_table(
    rows: list[dict], protocol: dict, folder: Path | str, name: str, shown: dict[str, str] | None = None
) -> list[Path]:
    """Write rows with their protocol as `<name>.json`, and the columns `shown` (field: heading) as `.csv` and `.md`."""
    folder = figures_folder(folder)
    shown = shown or {field: field for field in rows[0]}
    write_json(folder / f"{name}.json", {"protocol": protocol, "rows": rows})
    frame = pd.DataFrame(rows)
    write_text(folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    write_text(folder / f"{name}.md", markdown(rows, shown))
    return [folder / f"{name}.{kind}" for kind in ("json", "csv", "md")]


def keep_row(
    row: dict, place: Callable[[dict], object], protocol: dict, folder: Path | str, name: str, shown: dict[str, str]
) -> Path:
    """Put `row` at its `place` into `<name>.json`, for another that was there, and write the table; returns its path.

    Rows whose place is None and rows that were judged in another way (`study_hash`) are dropped.
    """
    path, row = figures_folder(folder) / f"{name}.json", row | {"study": study_hash(protocol)}
    with locked(path):
        rows = _read_rows(path)
        rows = {place(r): r for r in [*rows, row] if r.get("study") == row["study"]}
        ordered = [rows[at] for at in sorted(at for at in rows if at is not None)]
        return save_table(ordered, protocol, folder, name, shown)[0]


def _read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = read_object(path, mend := "restore or remove it").get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is damaged (no rows); {mend}")
    return rows


def check_table(folder: Path | str, name: str) -> None:
    """Raise UserError where `keep_row` could not keep a row, before hours are spent on one."""
    make_folder(figures_folder(folder))
    _read_rows(figures_folder(folder) / f"{name}.json")


def study_hash(protocol: dict) -> str:
    """12 hexadecimal digits of what makes rows comparable: feature spaces, teacher, number of images and their seeds."""
    return config_hash({field: protocol[field] for field in COMPARABLE})


def markdown(rows: list[dict], shown: dict[str, str]) -> str:
    """The fields `shown` (field: heading) of the rows as a Markdown table."""
    lines = ["| " + " | ".join(shown.values()) + " |", "|" + " --- |" * len(shown)]
    lines += ["| " + " | ".join(_cell(row.get(field)) for field in shown) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def dots(rows: list[dict], field: str, label: str, floor: tuple[float, float]) -> Figure:
    """One field on a logarithmic axis, a row each, with `<field>_sd` as error bar; `floor` (mean, sd) is a band."""
    figure, ax = plt.subplots(figsize=(6.4, 0.45 * len(rows) + 0.9))
    ax.axvspan(max(floor[0] - floor[1], floor[0] / 10), sum(floor), color=INK, alpha=0.12, lw=0, zorder=0)
    ax.axvline(floor[0], color=INK, ls=":", lw=1, zorder=1)
    ax.text(floor[0], -0.62, "real against real, random splits", fontsize=8, ha="center", va="bottom")
    for position, row in enumerate(rows):
        colour = COLOURS[row["recipe"] or "teacher"]
        ax.errorbar(row[field], position, xerr=row[f"{field}_sd"], fmt="o", color=colour, ms=7, capsize=3)
        text = f"{row[field]:.3g} ± {row[f'{field}_sd']:.2g}"
        ax.annotate(text, (row[field], position), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    ax.set(xlabel=label, yticks=range(len(rows)), yticklabels=[row["name"] for row in rows])
    _logarithmic(ax, "x")
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def plot_benchmark(rows: list[dict]) -> Figure:
    """Time per image of every row that has one, a dot each, coloured by variant; the names carry the batch."""
    frame = pd.DataFrame([row for row in rows if row.get("ms_per_image")])
    frame["label"] = [f"{row['name']}, batch {row['batch']}" for row in frame.to_dict("records")]
    figure, ax = plt.subplots(figsize=(7.5, 0.26 * frame.label.nunique() + 1))
    style = {"hue": "variant", "palette": "deep", "jitter": False, "size": 7, "alpha": 0.85}
    sns.stripplot(frame, x="ms_per_image", y="label", orient="h", ax=ax, **style)
    ax.set(xscale="log", xlabel=f"ms per image ({frame.device[0]}, {frame.threads[0]} threads)", ylabel="")
    ax.grid(axis="y", visible=True)
    ax.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    return figure


def plot_deploy(rows: list[dict]) -> Figure:
    """What one image takes, a line for each model and variant: time (a bar up to what 95 % of the calls took), the processor's
    time, peak memory, size on disk; a colour for each number of threads."""
    frame = pd.DataFrame([row for row in rows if row.get("ms_per_image") and row["batch"] == 1])
    frame["label"] = [name if "teacher" in name else f"{name}, {v}" for name, v in zip(frame["name"], frame.variant)]
    fields = {
        "ms_per_image": "ms per image",
        "cpu_seconds_per_image": "CPU-seconds per image",
        "peak_memory_mb": "peak memory, MB",
        "file_mb": "on disk, MB",
    }
    size = (11, 0.27 * frame.label.nunique() + 1)
    figure, axes = plt.subplots(1, len(fields), figsize=size, sharey=True, layout="constrained")
    colours = dict(zip(sorted(frame.threads.unique()), (IMPROVED_RECIPE, PAPER_RECIPE, TEACHER), strict=False))
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        sns.stripplot(
            frame, x=field, y="label", hue="threads", palette=colours, jitter=False, size=6, ax=ax, legend=ax is axes[0]
        )
        ax.set(xscale="log", xlabel=label, ylabel="")
        ax.grid(axis="y", visible=True)
    places = {label: place for place, label in enumerate(frame.label.unique())}
    for row in frame.dropna(subset=["p95_ms"]).to_dict("records"):
        span = [row["ms_per_image"], row["p95_ms"]]
        axes[0].plot(span, [places[row["label"]]] * 2, color=colours[row["threads"]], lw=1.5)
    handles = axes[0].get_legend_handles_labels()
    axes[0].get_legend().remove()
    figure.legend(*handles, title="threads", fontsize=7.5, title_fontsize=7.5, loc="outside right upper", frameon=False)
    return figure


def plot_costs(rows: list[dict]) -> Figure:
    """Time and activations of every submodule, a bar each; a colour for each recipe."""
    frame, fields = pd.DataFrame(rows), {"ms": "ms", "activations_mb": "activations at once, MB"}
    frame["label"] = [f"{row['submodule']}\n{row['image_px']} px" for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        sns.barplot(frame, x="label", y=field, hue="recipe", palette=COLOURS, ax=ax, legend=ax is axes[0])
        ax.set(xlabel="submodule", ylabel=label)
        ax.tick_params(axis="x", labelsize=7)
        ax.grid(axis="x", visible=False)
    return figure


def plot_settings(
    rows: list[dict],
    groups: Sequence[str],
    field: str,
    label: str,
    lines: dict[str, float],
    marked: Collection[str] = (),
) -> Figure:
    """A panel for each group of ablation rows, with an axis of its own: every seed's `field` as a dot, the mean of a setting
    and the range of its seeds.

    `lines` (name: value) are drawn through all panels. Settings with a `preset_hash` in `marked` are in bold. A failed
    training shows as a cross at the right edge.
    """
    columns = min(3, len(groups))
    counts = [len({row["setting"] for row in rows if row["group"] == group}) for group in groups]
    heights = [max(counts[i : i + columns]) + 1.6 for i in range(0, len(groups), columns)]
    size = (4.6 * columns if columns > 1 else 7.5, 0.27 * sum(heights) + 0.4)
    figure, axes = plt.subplots(
        len(heights), columns, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, group in zip(axes.flat, groups, strict=False):
        frame = pd.DataFrame([row for row in rows if row["group"] == group])
        _settings_panel(ax, frame, field)
        bold = set(frame[frame["preset_hash"].isin(marked)].setting) if marked else ()
        for text in ax.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() in bold else "normal")
        for (name, value), dashes in zip(lines.items(), (":", "--", "-."), strict=False):
            ax.axvline(value, color=INK, ls=dashes, lw=1, zorder=0, label=name)
        ax.set(ylabel="", xlabel="", title=group)
        _logarithmic(ax, "x")  # last: on such an axis seaborn would take the mean of the logarithms
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(len(groups) - columns, 0) : len(groups)]:  # the last of each column
        ax.set_xlabel(label)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside upper left", ncols=3, frameon=False
    )
    return figure


def _settings_panel(ax: Axes, frame: pd.DataFrame, field: str) -> None:
    style = {"data": frame, "x": field, "y": "setting", "orient": "h", "ax": ax, "color": IMPROVED_RECIPE}
    sns.stripplot(**style, size=4, alpha=0.35, jitter=False)
    sns.pointplot(**style, errorbar=("pi", 100), linestyle="none", markersize=5, err_kws={"lw": 1.5})
    if "error" in frame:
        failed = frame[frame["error"].notna()].setting
        ax.plot([0.98] * len(failed), failed, "x", color=PAPER_RECIPE, transform=ax.get_yaxis_transform())


def plot_against(rows: list[dict], x: str, y: str, labels: tuple[str, str], log: str = "xy") -> Axes:
    """Rows as points in the plane of two fields, coloured by `colour` or else by `recipe`, named by `name` where they have
    one; the axes `log` are logarithmic."""
    _, ax = plt.subplots(figsize=(6.4, 4.2))
    for row in rows:
        bars = [row.get(f"{field}_sd") for field in (x, y)]
        colour = row.get("colour") or COLOURS[row["recipe"] or "teacher"]
        style = {"fmt": row.get("marker", "o"), "color": colour, "ms": 6, "lw": 1, "capsize": 2}
        ax.errorbar(row[x], row[y], xerr=bars[0], yerr=bars[1], **style)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    _logarithmic(ax, log)
    _name_points(ax, [(row["name"], (row[x], row[y])) for row in rows if row.get("name")])
    return ax


MARKER_PT = 6
APART = 0.012  # of the range of x, between methods that share one: they overlap a little, and are still near it
# Of a name, in points from its own point, roughly the nearest first.
NAME_PLACES = [(5, 4), (5, -10), (-5, 4), (-5, -10), (7, -3), (-7, -3)] + [
    (right, up) for far in range(15, 120, 10) for up in (far, -far, 0, far // 2, -far // 2) for right in (far, -far)
]


def _name_points(ax: Axes, points: list[tuple[str, tuple[float, float]]]) -> None:
    """Write the names beside their points, each at the nearest place inside the axes where no other name or named point is;
    a line leads to it where that is not next to its own. Where none is free the name stands next to its point."""
    ax.figure.canvas.draw()  # fixes the axes
    places = [tuple(ax.transData.transform(at)) for _, at in points]
    inside, taken = ax.get_window_extent(), [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for name, at in sorted(points, key=lambda point: point[1]):
        for right, up in NAME_PLACES:
            line = {"arrowstyle": "-", "lw": 0.6, "color": "0.5"} if abs(right) + abs(up) > 15 else None
            style = {"textcoords": "offset points", "ha": "left" if right > 0 else "right", "fontsize": 7.5}
            text = ax.annotate(name, at, (right, up), arrowprops=line, **style)
            text.update_positions(ax.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the line
            fits = inside.contains(*box.min) and inside.contains(*box.max) and not any(map(box.overlaps, taken))
            if fits and (line or min(places, key=partial(_gap, box)) == tuple(ax.transData.transform(at))):
                break
            text.remove()
        else:
            ax.annotate(name, at, NAME_PLACES[0], textcoords="offset points", fontsize=7.5)
        taken.append(box)


def _gap(box: Bbox, place: tuple[float, float]) -> float:
    """How far a place is from a box, in pixels."""
    return math.dist(place, [min(max(x, low), high) for x, low, high in zip(place, box.min, box.max, strict=True)])


def _logarithmic(ax: Axes, axes: str = "xy") -> None:
    """Make the named axes logarithmic, with plain numbers at 1, 2 and 5: over a factor of 2000 or more at 1 alone, below 10 at
    some more."""
    for name in axes:
        ax.set(**{f"{name}scale": "log"})
        axis = getattr(ax, f"{name}axis")
        low, high = sorted(getattr(ax, f"get_{name}lim")())
        subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 2000 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:,.9g}")
        axis.set_minor_formatter(NullFormatter())


def plot_methods(
    rows: list[dict], x: str, y: str, labels: tuple[str, str], lines: dict[str, float], named: str = "steps"
) -> Figure:
    """Rows as points in the plane of two fields, on logarithmic axes: a colour for each `method`, shared by its variants
    ("method, variant"), and a marker for each of all. Where colours share an x, they stand side by side around it. A method's
    points are joined and say their field `named` where there are several; `<field>_sd` as error bars. Unless `named` is the
    budget, those of a larger budget are hollow, on a line of their own, with the Pareto front of all behind, at their true x.
    `lines` (name: value of y) are drawn across."""
    figure, ax = plt.subplots(figsize=(7.5, 4.4))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    families = dict.fromkeys(_family(method) for method in methods if not method.startswith("teacher"))
    colours = dict(zip(families, sns.color_palette("deep", len(families)), strict=True)) | {"teacher": TEACHER}
    teachers = [method for method in methods if _family(method) == "teacher"]
    marked = list(dict.fromkeys([*families, *teachers, *methods]))  # all look alike with variants drawn and without
    curves = {(row["method"], 0 if named == "budget" else row.get("budget") or 0) for row in rows}
    beside, legend = _beside(rows, x), []
    for method, budget in sorted(curves, key=lambda curve: (methods.index(curve[0]), curve[1])):
        of = [row for row in rows if row["method"] == method and budget in (0, row.get("budget"))]
        family = _family(method)
        of, colour = sorted(of, key=lambda row: row[named]), colours[family]
        more = any(curve[0] == method and curve[1] < budget for curve in curves)
        dashes, inside, name = ("--", "white", f", budget {budget:g}") if more else ("-", colour, "")
        style = {"fmt": MARKERS[marked.index(method) % len(MARKERS)] + dashes, "color": colour, "mfc": inside}
        style |= {"ms": MARKER_PT, "lw": 1, "capsize": 2, "clip_on": False, "label": method + name}
        bars = [[row.get(f"{field}_sd") or 0 for row in of] for field in (x, y)]
        at = [beside[family, row[x]] for row in of]
        drawn = ax.errorbar(at, [row[y] for row in of], xerr=bars[0], yerr=bars[1], **style)
        legend.append((drawn[0], method + name))  # without the bars, which would hide the marker
        second = more or any(_family(m) == family for m in methods[: methods.index(method)])
        below = {"xytext": (3, -4), "va": "top"} if second else {"xytext": (3, 4)}  # two of a colour are often close
        for row, here in zip(of, at, strict=True) if len(of) > 1 else []:
            ax.annotate(row[named], (here, row[y]), textcoords="offset points", fontsize=7, color=colour, **below)
    for (name, value), dashes in zip(lines.items(), (":", "--", "-."), strict=False):
        legend.append((ax.axhline(value, color=INK, ls=dashes, lw=1, zorder=0), name))
    if named != "budget":
        front = pareto_front([(row[x], row[y]) for row in rows])
        (line,) = ax.step(*zip(*front, strict=True), "0.8", where="post", lw=3, zorder=0)
        legend.append((line, "Pareto front"))
    ax.set(xlabel=labels[0], ylabel=labels[1])
    _logarithmic(ax)
    ax.legend(*zip(*legend, strict=True), fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    return figure


def _family(method: str) -> str:
    """The method of which `method`, "method, variant", is a variant, or itself."""
    return method.split(",")[0]


def _beside(rows: list[dict], x: str) -> dict[tuple[str, float], float]:
    """Where on a logarithmic axis each family of methods is drawn that has a row at an x: there, or side by side around it."""
    times = sorted({row[x] for row in rows})
    apart = max(times[-1] / times[0], 2) ** APART  # also where all share one
    drawn = {}
    for time in times:
        here = list(dict.fromkeys(_family(row["method"]) for row in rows if row[x] == time))
        for place, family in enumerate(here):
            drawn[family, time] = time * apart ** (place - (len(here) - 1) / 2)
    return drawn


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that no other is at least as good as in both, by x; less is better."""
    front = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def plot_samples(rows: list[dict], images: list[Tensor], columns: int = 5) -> Figure:
    """Images `(n, c, h, w)` in [-1, 1] of each row under its `method`, number of `steps` and, if it is not 1, `budget`."""
    lines = -(-len(rows) // columns)
    height = lines * (0.4 + 9.6 / columns / len(images[0]))  # of titles and of images as wide as they fit
    figure, axes = plt.subplots(lines, columns, figsize=(10, height), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (row, shown) in zip(axes.flat, zip(rows, images, strict=True), strict=False):
        how = f"{row['steps']} step" + "s" * (row["steps"] > 1)
        how += f", budget {row['budget']:g}" if row.get("budget") not in (None, 1) else ""
        show_images(ax, shown, len(shown))
        ax.set_title(f"{row['method']}\n{how}", loc="left", fontsize=7.5)
    return figure


def plot_preferences(ranking: list[dict], rates: list[dict]) -> Figure:
    """Strengths of methods, best first, and how often each pair's first won, both with their 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 0.3 * max(len(ranking), len(rates)) + 1.2), layout="constrained")
    sides = (
        (axes[0], [(row["method"], row["strength"], row) for row in ranking], 0.0, "strength, log-odds of a win"),
        (axes[1], [(f"{r['method']} over {r['against']}", r["rate"], r) for r in rates], 0.5, "share of the votes"),
    )
    for ax, found, neutral, label in sides:
        for place, (_, value, row) in enumerate(found):
            bars = [[max(value - row["low"], 0)], [max(row["high"] - value, 0)]]
            ax.errorbar(value, place, xerr=bars, fmt="o", color=IMPROVED_RECIPE, ms=6, capsize=3)
        ax.axvline(neutral, color=INK, ls=":", lw=1, zorder=0)
        ax.set(yticks=range(len(found)), yticklabels=[name for name, *_ in found], xlabel=label)
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
    return figure


def plot_shares(rows: list[dict], factor: str, real: Sequence[float], names: Sequence[str] = ()) -> Figure:
    """How often each class of `factor`, by `names` or by number, appears among real images (bars) and among those of each
    row (dots)."""
    turn = 35 if max(map(len, names), default=0) > 2 else 0  # of long names
    figure, ax = plt.subplots(figsize=(max(6.4, 0.27 * len(real)), 3.4 if turn else 2.4))
    ax.bar(range(len(real)), real, color="0.88", label="held-out real images")
    used = []
    for row, marker in zip(rows, "os^Dv", strict=False):
        colour = COLOURS[row["recipe"] or "teacher"]
        style = {"ls": "", "marker": marker, "ms": 5, "color": colour, "alpha": 0.8, "label": row["name"]}
        ax.plot(row[f"shares_{factor}"], fillstyle="none" if colour in used else "full", **style)
        used.append(colour)
    ax.set(xlabel=factor, ylabel="share of the images")
    ax.set_xticks(
        range(len(real)), names or range(len(real)), fontsize=7.5, rotation=turn, ha="right" if turn else "center"
    )
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    return figure
