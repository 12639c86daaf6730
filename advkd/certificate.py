"""What was regenerated beside what is committed, cell by cell: exact, within a stated tolerance, or different."""

import json
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from advkd.data import FACTORS, reference_images, to_uint8
from advkd.figures import figures_folder
from advkd.files import fingerprint, first_line, sha256, write_text
from advkd.presets import ASSETS, load_preset
from advkd.teacher import load_teacher

PACKAGES = ("numpy", "scipy", "scikit-learn", "pillow", "torch", "torchvision", "diffusers", "torch-fidelity")
EXACT, WITHIN, TIME, DIFFERENT = "exact", "within tolerance", "time or memory", "different"
# Fields that say how fast or how large this machine's processes are; nobody's are twice the same.
TIMES = re.compile(r"(^|_)ms(_|$)|seconds|per_s$|memory|^calls$|^times_paper$")


@dataclass(frozen=True)
class Tolerance:
    """How far a number may lie from the committed one: `absolute`, or `relative` to it, whichever is more."""

    fields: str  # regular expression
    rows: str  # regular expression of what the cells of text in a row say
    absolute: float
    relative: float
    why: str

    def allows(self, committed: float, found: float) -> bool:
        """Whether two finite numbers are close enough."""
        return abs(found - committed) <= max(self.absolute, self.relative * abs(committed))


# The first that fits counts; a field that none fits has to be exact. Another type of processor rounds in another way:
# that moves the teacher's samples a little, and a training to another of its possible ends.
TOLERANCES = (
    Tolerance("_sd$", "", 0.1, 0.5, "a deviation over a few values"),
    Tolerance("^(measured_)?(fd|kid)", "paper", 1.0, 0.6, "the paper's recipe, briefly trained, is chaotic"),
    Tolerance("^auc", "paper", 0.2, 0.0, "its critic too"),
    Tolerance("^gradient_norm", "", 0.1, 0.6, "one critic at the end of its training"),
    Tolerance("^auc", "", 0.06, 0.0, "its answers on a few hundred images"),
    Tolerance("^fd_unseen", "", 0.01, 0.2, "a distance of hundredths"),
    Tolerance("^(measured_)?fd", "teacher", 0.02, 0.05, "the teacher's samples, 50 or 100 roundings deep"),
    Tolerance("^(measured_)?fd", "", 0.03, 0.2, "a training that ends elsewhere: three deviations over its seeds"),
    Tolerance("^kid", "", 0.015, 0.0, "the error of KID at these numbers of images"),
    Tolerance("^(precision|recall|density|coverage|pull_to_train)$", "", 0.06, 0.0, "another training, other samples"),
    Tolerance("^(near_copies|shares)", "", 0.02, 0.0, "shares of a few thousand samples"),
    Tolerance("^file_mb$", "int8", 0.0, 0.01, "as many bytes as a student's own scales take"),
    Tolerance("^(same_noise|shuffled|variance_explained)", "", 0.03, 0.0, "shares of a thousand samples"),
)


@dataclass(frozen=True)
class Cell:
    """One number or word of a table in both versions, and the verdict on it."""

    table: str
    row: int
    field: str
    committed: object
    found: object
    verdict: str
    tolerance: Tolerance | None = None


def certify(root: Path, preset: str, tables: Iterable[str]) -> tuple[Path, dict[str, int]]:
    """Compare regenerated tables, paths of JSON files from `root`, with those of the last commit.

    Writes `figures/<preset>/certificate.md` with every cell that is not exact, and what the numbers were made by; returns its
    path and how many cells have which verdict. What the commit does not have, or where there is no git, is not compared.
    """
    cells, new = [], []
    for table in sorted(tables):
        committed, found = _committed(root, table), json.loads((root / table).read_text(encoding="utf-8"))
        if committed is None:
            new.append(table)
        else:
            cells += compare(Path(table).stem, committed["rows"], found["rows"])
    counts = {verdict: sum(c.verdict == verdict for c in cells) for verdict in (EXACT, WITHIN, TIME, DIFFERENT)}
    path = figures_folder(root / "figures" / preset) / "certificate.md"
    write_text(path, "\n".join(_text(cells, counts, new, made_by(root, preset))) + "\n")
    return path, counts


def compare(table: str, committed: list[dict], found: list[dict]) -> Iterator[Cell]:
    """The cells of a table, of its rows in their order; a cell that only one version has is different."""
    for n in range(max(len(committed), len(found))):
        before, after = (rows[n] if n < len(rows) else {} for rows in (committed, found))
        words = " ".join(str(value) for value in before.values() if isinstance(value, str))
        for field in before.keys() | after.keys():
            pairs = _pairs(before.get(field), after.get(field))
            for old, new in pairs:
                tolerance = _tolerance(field, words)
                yield Cell(table, n, field, old, new, _verdict(field, old, new, tolerance), tolerance)


def _pairs(old: object, new: object) -> list[tuple]:
    """The cells of two values, which may be lists of them."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return list(zip(old, new, strict=True))
    return [(old, new)]


def _tolerance(field: str, words: str) -> Tolerance | None:
    return next((t for t in TOLERANCES if re.search(t.fields, field) and re.search(t.rows, words)), None)


def _verdict(field: str, old: object, new: object, tolerance: Tolerance | None) -> str:
    if old == new or (old != old and new != new):  # no number is one value too
        return EXACT
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (old, new))
    if numbers and TIMES.search(field):
        return TIME
    return WITHIN if numbers and tolerance and tolerance.allows(old, new) else DIFFERENT


def _committed(root: Path, table: str) -> dict | None:
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{table}"], cwd=root, capture_output=True, check=True, timeout=60
        ).stdout
        return json.loads(shown)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def made_by(root: Path, preset: str) -> dict[str, str]:
    """What numbers depend on: code, versions, machine, seeds, and hashes of data and weights."""
    p, extractor = load_preset(preset), ASSETS / f"{preset}-extractor" / "diffusion_pytorch_model.safetensors"
    facts = {
        "commit": _git(root, "rev-parse", "HEAD") or "no git",
        "changed since": ", ".join(_git(root, "diff", "--name-only", "HEAD", "--", "advkd", "notebooks").split())
        or "-",
        "platform": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    facts |= {name: version(name) for name in PACKAGES}
    facts |= {"seeds": f"training {p.seed}, trajectories {p.trajectory_seed}; of samples see each table's protocol"}
    facts["teacher"] = load_teacher(p).fingerprint
    if p.data in FACTORS:
        for split in ("train", "heldout"):
            images = reference_images(p, split)[0]
            facts[f"{split} images"] = f"{len(images)}, as 8 bits {fingerprint({'images': to_uint8(images)})}"
        facts["extractor"] = sha256(extractor)[:12]
    for run in sorted((root / "runs" / preset).glob("*/student/student/*.safetensors")):
        facts[f"student {run.parts[-4]}"] = sha256(run)[:12]
    return facts


def _git(root: Path, *arguments: str) -> str:
    try:
        told = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=60)
        return told.stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return "" if isinstance(error, subprocess.CalledProcessError) else first_line(error)


def _text(cells: list[Cell], counts: dict[str, int], new: list[str], facts: dict[str, str]) -> Iterator[str]:
    yield "# Certificate\n"
    yield (
        "Every cell of the tables that the notebooks wrote, beside the tables of the commit that is named below. What they "
        "take from committed studies (targets, glyphs_targets, head_to_head_summary, deploy_summary, deploy_targets) is "
        "calculated again, not measured again.\n"
    )
    yield f"| table | {' | '.join(counts)} |\n|{' --- |' * (len(counts) + 1)}"
    for table in sorted({cell.table for cell in cells}):
        own = [sum(c.verdict == verdict for c in cells if c.table == table) for verdict in counts]
        yield f"| {table} | {' | '.join(map(str, own))} |"
    yield f"| **all** | {' | '.join(f'**{n}**' for n in counts.values())} |\n"
    if new:
        yield f"Not compared, for the commit has none: {', '.join(new)}.\n"
    for verdict in (DIFFERENT, WITHIN):
        if some := [cell for cell in cells if cell.verdict == verdict]:
            yield f"## {verdict.capitalize()}\n\n| table | row | field | committed | here | allowed |\n|{' --- |' * 6}"
            for c in sorted(some, key=lambda c: (c.table, c.row, c.field)):
                allowed = f"{c.tolerance.absolute:g} or {c.tolerance.relative:.0%}" if c.tolerance else "exact"
                yield f"| {c.table} | {c.row} | {c.field} | {_shown(c.committed)} | {_shown(c.found)} | {allowed} |"
            yield ""
    yield "## Tolerances\n\nTimes and memory are not judged. Whatever is not named here has to be exact.\n"
    yield f"| fields | rows | absolute or relative | why |\n|{' --- |' * 4}"
    for t in TOLERANCES:
        fields, rows = (f"`{text}`".replace("|", "\\|") if text else "all" for text in (t.fields, t.rows))
        yield f"| {fields} | {rows} | {t.absolute:g} or {t.relative:.0%} | {t.why} |"
    yield f"\n## Made by\n\n| what | value |\n|{' --- |' * 2}"
    for name, value in facts.items():
        yield f"| {name} | {value} |"


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
