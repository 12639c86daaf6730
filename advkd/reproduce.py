"""Run the notebooks in order through papermill; skip what is up to date; say what was made."""

import hashlib
import io
import json
import re
import time
from pathlib import Path

import click
import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from advkd import files
from advkd.certificate import certify
from advkd.presets import ASSETS, UserError, load_preset

NOTEBOOKS = ("01_teacher", "02_submodules", "03_train", "04_evaluate", "05_ablations", "06_head_to_head", "07_deploy")
STUDIES = {  # committed files below figures/ that a notebook reads; without them it is left out
    "05_ablations": ("{preset}/quality.json", "{preset}/ablations.json", "glyphs/quality.json"),
    "06_head_to_head": tuple(
        f"{data}/head_to_head.{end}" for data in ("{preset}", "glyphs") for end in ("json", "safetensors")
    ),
    "07_deploy": ("deploy.json",),
}


def reproduce(preset: str, parameters: dict[str, str], force: bool = False) -> int:
    """Execute the notebooks for `preset` into runs/<preset>/, print a summary, return the exit status.

    `parameters` go to every notebook that declares them. A notebook is up to date when its cells, its parameters, the
    package, the notebooks before it, the studies that it reads and the files that it wrote are what they were. A notebook whose
    studies the preset does not have is left out. At the end, and with the notebooks' own parameters, the tables are compared
    with the committed ones (`certificate.certify`). Another reproduction of the preset is waited for. Raises UserError
    for a parameter that no notebook has, or of another type than it declares.
    """
    if "preset" in parameters:
        raise UserError(f"the preset is named by --preset {parameters['preset']}, not by a parameter")
    root = files.project_root()
    load_preset(preset)
    declared = {name: papermill.inspect_notebook(str(root / "notebooks" / f"{name}.ipynb")) for name in NOTEBOOKS}
    known = sorted(set().union(*declared.values()))
    if unknown := [name for name in parameters if name not in known]:
        raise UserError(f"no notebook has a parameter {unknown[0]!r}; parameters: {', '.join(known)}")
    for of_one in declared.values():
        for name in parameters.keys() & of_one.keys():
            _typed(name, parameters[name], of_one[name])
    with files.alone(root / "runs" / preset / "reproduce"):
        return _reproduce(root, preset, parameters, declared, force)


def _reproduce(root: Path, preset: str, parameters: dict[str, str], declared: dict[str, dict], force: bool) -> int:
    state_file = root / "runs" / preset / "reproduce.json"
    state = _read_state(state_file, preset) if state_file.exists() else {}
    rows, upstream = [], _package_hash()
    for name in NOTEBOOKS:
        given = {"preset": preset} | {
            k: _typed(k, v, declared[name][k]) for k, v in parameters.items() if k in declared[name]
        }
        source = root / "notebooks" / f"{name}.ipynb"
        studies = [root / "figures" / t.format(preset=preset) for t in STUDIES.get(name, ())]
        if missing := [path for path in studies if not path.exists()]:
            rows.append((name, 0.0, f"left out: no {missing[0].relative_to(root)}", []))
            continue
        upstream = _hash(upstream, _cells(source), json.dumps(given, sort_keys=True), *map(files.sha256, studies))
        if not force and _is_up_to_date(root, state.get(name), upstream):
            rows.append((name, 0.0, "up to date", sorted(state[name]["wrote"])))
            continue
        start, before = time.time(), _figures(root, preset)
        error = _execute(root, source, root / "runs" / preset / f"{name}.ipynb", given)
        seconds, wrote = time.time() - start, _written(root, preset, before, start)
        if error:
            state.pop(name, None)
            files.write_json(state_file, state)
            rows.append((name, seconds, "failed", sorted(wrote)))
            _summary(preset, rows)
            click.echo(f"advkd: error: notebook {name} failed {error}", err=True)
            return 1
        state[name] = {"hash": upstream, "wrote": wrote}
        files.write_json(state_file, state)
        rows.append((name, seconds, "done", sorted(wrote)))
    if preset == "digits" and not parameters:  # the README shows the defaults
        update_readme(root)
    _summary(preset, rows)
    tables = {path for _, _, _, wrote in rows for path in wrote if path.endswith(".json")}
    if tables and not parameters:
        path, counts = certify(root, preset, tables)
        click.echo(f"certificate: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())} ({path})")
    return 0


def update_readme(root: Path) -> None:
    """Put the regenerated Table 1 of the digits, its floor, and the short tables of the comparison and of what an image takes
    between the README's markers for them."""
    readme, figures = root / "README.md", root / "figures" / "digits"
    if not readme.exists() or not (figures / "table1.json").exists():
        return
    protocol = json.loads((figures / "table1.json").read_text())["protocol"]
    mean, sd = (protocol[f"floor_random_splits{end}"] for end in ("", "_sd"))
    text = readme.read_text(encoding="utf-8")
    shown = {"table1": f"\n{(figures / 'table1.md').read_text()}", "floor": f"{mean:.2f} ± {sd:.2f}"}
    for name in ("head_to_head", "deploy"):
        if (path := figures / f"{name}_summary.md").exists():
            shown[name] = f"\n{path.read_text()}"
    for name, value in shown.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->{value}{end}{after}" if end else text
    if text != readme.read_text(encoding="utf-8"):
        files.write_text(readme, text)


def _execute(root: Path, source: Path, target: Path, parameters: dict) -> str | None:
    """Run one notebook; None, or where it failed and why."""
    click.echo(f"{source.stem} ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters,
            kernel_name="python3",
            progress_bar=not files.quiet(True),
            cwd=str(root),
            log_output=False,
            stderr_file=_Said(),
        )
    except PapermillExecutionError as error:
        return f"in cell [{error.exec_count}] of {target.relative_to(root)}: {error.ename}: {error.evalue}"
    except DeadKernelError as error:
        return f"in {target.relative_to(root)}: {error} (out of memory?)"
    return None


class _Said(io.TextIOBase):
    """Shows what the package says in a kernel, such as that it waits for another process; not the libraries' warnings."""

    begun = ""  # a line whose end is still to come

    def write(self, text: str) -> int:
        *lines, self.begun = re.split(r"[\r\n]", self.begun + text)  # progress bars end lines in \r
        for line in lines:
            if said := re.search("advkd: .*", line):  # perhaps behind a line that nobody ended
                click.echo(said[0], err=True)
        return len(text)


def _summary(preset: str, rows: list[tuple[str, float, str, list[str]]]) -> None:
    click.echo(f"\n{'notebook':<16}{'seconds':>8}  {'result':<12}wrote")
    for name, seconds, result, wrote in rows:
        names = ", ".join(Path(path).name for path in wrote) or "-"
        click.echo(f"{name:<16}{seconds:>8.0f}  {result:<12}{names}")
    if not any(result in ("done", "failed") for _, _, result, _ in rows):
        click.echo(f"everything in figures/{preset}/ is up to date")


def _typed(name: str, value: str, declared: dict) -> object:
    """A parameter from the command line as the notebook declares it. Raises UserError for a value of another type."""
    kinds = {"int": (int, "a whole number"), "float": (int | float, "a number"), "bool": (bool, "true or false")}
    if declared["inferred_type_name"] not in kinds:  # text stays text, even where JSON could read it
        return value
    kind, wanted = kinds[declared["inferred_type_name"]]
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise UserError(f"parameter {name} is {value!r}, but must be {wanted}")
    return found


def _cells(path: Path) -> str:
    """The code of a notebook, without outputs and text."""
    notebook = nbformat.read(path, as_version=4)
    return json.dumps([cell.source for cell in notebook.cells if cell.cell_type == "code"])


def _package_hash() -> str:
    """A hash of all that the notebooks import and load from the package."""
    package = ASSETS.parent
    paths = sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return _hash(*(f"{p.relative_to(package)}:{files.sha256(p)}" for p in paths))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _figures(root: Path, preset: str) -> dict[str, str]:
    folder = root / "figures" / preset
    paths = [p for p in sorted(folder.glob("*")) if p.is_file() and not p.name.startswith(".")]  # no halves
    return {str(p.relative_to(root)): files.sha256(p) for p in paths}


def _written(root: Path, preset: str, before: dict[str, str], start: float) -> dict[str, str]:
    """Figures that changed, or that were written again with the same bytes, since `start`."""
    after = _figures(root, preset)
    return {p: h for p, h in after.items() if before.get(p) != h or (root / p).stat().st_mtime >= start - 1}


def _read_state(path: Path, preset: str) -> dict:
    """What earlier runs wrote. Only files that a notebook could have written are looked at, whatever it names."""
    state = files.read_object(path, f"remove it, and everything of {preset!r} runs again")
    for name, entry in state.items():
        if not isinstance(entry, dict) or "hash" not in entry or not isinstance(entry.get("wrote"), dict):
            raise UserError(f"{path} is damaged (of {name}); remove it, and everything of {preset!r} runs again")
        for wrote in entry["wrote"]:
            if Path(wrote).parts[:-1] != ("figures", preset) or Path(wrote).name == "..":
                raise UserError(f"{path} names {wrote!r}, which is no file in figures/{preset}; remove it")
    return state


def _is_up_to_date(root: Path, entry: dict | None, wanted: str) -> bool:
    if not entry or entry["hash"] != wanted:
        return False
    return all((root / p).exists() and files.sha256(root / p) == digest for p, digest in entry["wrote"].items())
