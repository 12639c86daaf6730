"""Figures and tables: grids, curves, and the only writers of the figures folder."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from advkd.files import project_root, write_atomic, write_json, write_text
from advkd.presets import config_hash

DPI = 110
COMPARABLE = ("extractor", "unseen", "teacher_fingerprint", "images", "sampling_seed", "fd_train_subset")
INK, PAPER_RECIPE, IMPROVED_RECIPE, TEACHER = "#333333", "#c8553d", "#2a6f97", "#7a7a7a"
COLOURS = {"paper": PAPER_RECIPE, "improved": IMPROVED_RECIPE, "teacher": TEACHER}


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


def live_curves(records: Iterator, fields: dict[str, str], every: int = 500) -> list:
    """Consume `records`, redrawing their curves in the notebook every `every` records; returns them all."""
    from IPython.display import display

    seen, figure, handle = [], plt.figure(figsize=(2.9 * len(fields), 2.5)), None
    plt.close(figure)  # shown by its handle alone
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
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {place(r): r for r in [*rows, row] if r.get("study") == row["study"]}
    ordered = [rows[at] for at in sorted(at for at in rows if at is not None)]
    return save_table(ordered, protocol, folder, name, shown)[0]


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
    ax.set(xscale="log", xlabel=label, yticks=range(len(rows)), yticklabels=[row["name"] for row in rows])
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
