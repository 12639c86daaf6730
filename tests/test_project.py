"""The project's own promises: notebook pairs, one place for versions, nothing unpickled, no work at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

from advkd.reproduce import NOTEBOOKS

ROOT = Path(__file__).parent.parent


# What executes code of the file or the text that it is given.
UNSAFE = re.compile(
    r"torch\.load\((?!.*weights_only=True)|weights_only=False|torch\.save\(|torch\.jit\.load|hub\.load|pickle_module"
    r"|\bpickle\.\w|\b(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal)\b|read_pickle|allow_pickle=True"
    r"|joblib\.load|trust_remote_code=True|use_safetensors=False|yaml\.(unsafe_|full_)?load\(|shell=True|os\.(system|popen)"
    r"|extractall|(?<![\w.])(eval|exec)\("
)
SAFE_LINES = (
    'torch.load(path, map_location="cpu", weights_only=True)',
    "model.eval()",
    "np.load(path)",
    "yaml.safe_load(text)",
    "torch.hub.get_dir()",
    "the pickled weights",
)
UNSAFE_LINES = (
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.save(model, path)",
    "torch.jit.load(path)",
    'torch.hub.load("a/b", "c")',
    "torch.hub.load_state_dict_from_url(url)",
    "import pickle",
    "from joblib import load",
    "pickle.loads(data)",
    "joblib.load(path)",
    "pd.read_pickle(path)",
    "np.load(path, allow_pickle=True)",
    "from_pretrained(name, trust_remote_code=True)",
    "from_pretrained(name, use_safetensors=False)",
    "yaml.load(text)",
    "subprocess.run(text, shell=True)",
    "os.system(text)",
    "archive.extractall()",
    "x = eval(text)",
    "exec(text)",
)


def cells(notebook) -> list[tuple]:
    return [(c.cell_type, c.source, tuple(c.metadata.get("tags", []))) for c in notebook.cells]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_and_its_py_have_the_same_cells(name):
    stored = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert cells(stored) == cells(jupytext.read(ROOT / "notebooks" / f"{name}.py"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_of_one_run_from_the_top(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_lives_in_the_package(name):
    for cell in jupytext.read(ROOT / "notebooks" / f"{name}.py").cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 20
            functions = re.findall(r"^def .*(?:\n .*)*", cell.source, re.MULTILINE)
            assert all(len(f.splitlines()) <= 5 for f in functions)


def test_conda_users_get_the_versions_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert {re.split("[=<>]", name)[0] for name in conda} == {"python", "pip", "make"}
    assert pip == {"pip": ["-e .[dev]"]}


def test_lock_is_pins_with_their_hashes_and_nothing_else():
    pin = (
        r"[\w.-]+==[\w.+]+( ; [^\n:]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"  # no room for an option or an address
    )
    lock = (ROOT / "requirements.lock").read_text()
    assert re.fullmatch(f"({pin})+", lock)
    assert len(re.findall(pin, lock)) > 100


def test_lock_holds_every_dependency():
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev|dino|onnx) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    wanted = {re.split(r"[\[<>=!]", item)[0] for items in lists for item in re.findall(r'"([^"]+)"', items)} - {"advkd"}
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert len(lists) == 4 and len(wanted) > 25 and wanted <= pinned


def test_nothing_is_unpickled_but_tensors():
    sources = [*(ROOT / "advkd").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    assert len(sources) > 15
    for path in sources:
        assert not UNSAFE.search(path.read_text()), path.name


@pytest.mark.parametrize("line", SAFE_LINES)
def test_lines_that_load_tensors_alone_are_let_through(line):
    assert not UNSAFE.search(line)


@pytest.mark.parametrize("line", UNSAFE_LINES)
def test_lines_that_execute_what_they_load_are_found(line):
    assert UNSAFE.search(line)


def test_networks_of_others_are_read_from_safetensors_alone():
    calls = [
        call
        for path in (ROOT / "advkd").glob("*.py")
        for call in re.findall(r"\w+\.from_pretrained\(.*", path.read_text())
        if not call.startswith(("StudentPipeline.", "FewStepPipeline."))  # which read nothing else: test_security.py
    ]
    networks = [call for call in calls if "use_safetensors=True" in call]
    assert {call.split(".")[0] for call in networks} == {"UNet2DModel", "Extractor", "Dinov2Model"}
    assert all(re.match(r"(DinoFeatures|pipeline)\.", call) for call in calls if call not in networks), calls


def test_importing_the_package_does_nothing_heavy(tmp_path):
    light = "import sys, advkd.presets, advkd.__main__; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    names = ", ".join(f"advkd.{path.stem}" for path in sorted((ROOT / "advkd").glob("[a-z]*.py")))
    all_of_it = f"import torch; before = torch.get_rng_state(); import {names}; "
    all_of_it += "print(*(x == y for x, y in zip([before.tolist()], [torch.get_rng_state().tolist()])))"
    for script, printed in ((light, ["False", "False"]), (all_of_it, ["True"])):
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert result.stdout.split() == printed
    assert not list(tmp_path.iterdir())


def test_every_figure_of_the_readme_and_of_its_map_exists():
    readme = (ROOT / "README.md").read_text()
    names = re.findall(r"`([\w]+\.(?:png|\*))`", readme) + re.findall(r"figures/digits/([\w.]+)", readme)
    assert len(names) > 12
    for name in names:
        assert list((ROOT / "figures" / "digits").glob(name)), name


@pytest.mark.parametrize("name, file, columns", [("table1", "table1", 6), ("head_to_head", "head_to_head_summary", 14)])
def test_readme_shows_its_tables(name, file, columns):  # of Table 1 without what is measured anew
    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("|")[1 : 1 + columns]] for line in table.strip().splitlines()]

    shown = (ROOT / "README.md").read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert cells(shown) == cells((ROOT / "figures" / "digits" / f"{file}.md").read_text())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_gives_a_parameter_another_value(name):
    cells = jupytext.read(ROOT / "notebooks" / f"{name}.py").cells
    (given,) = (c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    parameters = {node.target.id for node in ast.parse(given).body if isinstance(node, ast.AnnAssign)}
    code = [c.source for c in cells if c.cell_type == "code" and c.source != given]
    stored = {
        n.id for c in code for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    assert parameters and not parameters & stored
