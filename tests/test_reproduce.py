"""The runner: skipping, parameter names, and the exit status of a failing notebook."""

import json
import subprocess

import nbformat
import pytest

from advkd import reproduce
from advkd.presets import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with two quick notebooks: the first writes a figure, the second fails on demand."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    first = "from pathlib import Path\nf = Path('figures/digits'); f.mkdir(parents=True, exist_ok=True)\n"
    says = "import sys\nfor said in ('advkd: waiting', 'a warning'): print(said, file=sys.stderr)\n"
    bodies = {"a": first + "_ = (f / 'a.txt').write_text(str(number))", "b": says + "assert number < 10, 'too large'"}
    for name, body in bodies.items():
        declare = nbformat.v4.new_code_cell("number: int = 1  # help\npreset: str = 'digits'  # help")
        declare.metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=[declare, nbformat.v4.new_code_cell(body)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(reproduce, "NOTEBOOKS", ("a", "b"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_in_order_then_skips_then_notices_a_changed_figure(project, capsys):
    assert reproduce.reproduce("digits", {"number": "7"}) == 0
    assert (project / "figures/digits/a.txt").read_text() == "7"
    assert (project / "runs/digits/b.ipynb").exists()
    printed = capsys.readouterr()
    assert "a.txt" in printed.out and "advkd: waiting\n" in printed.err and "a warning" not in printed.err
    assert reproduce.reproduce("digits", {"number": "7"}) == 0
    out = capsys.readouterr().out
    assert out.count("up to date") == 3 and "done" not in out
    (project / "figures/digits/a.txt").write_text("edited")
    assert reproduce.reproduce("digits", {"number": "7"}) == 0
    assert "done" in capsys.readouterr().out
    assert (project / "figures/digits/a.txt").read_text() == "7"


def test_it_ends_with_a_certificate_but_for_parameters_of_ones_own(project, capsys):
    first = nbformat.read(project / "notebooks/a.ipynb", as_version=4)
    first.cells[1].source += "\n_ = (f / 'a.json').write_text('{\"rows\": [{\"number\": ' + str(number) + '}]}')"
    nbformat.write(first, project / "notebooks/a.ipynb")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    assert reproduce.reproduce("digits", {"number": "2"}) == 0
    assert "certificate" not in capsys.readouterr().out
    for command in (["init", "-q"], ["add", "figures"], ["commit", "-qm", "tables"]):
        subprocess.run([*git, *command], check=True)
    assert reproduce.reproduce("digits", {}) == 0
    assert "certificate: 0 exact, 0 within tolerance, 0 time or memory, 1 different" in capsys.readouterr().out
    assert "| a | 0 | number | 2 | 1 | exact |" in (project / "figures/digits/certificate.md").read_text()


def test_a_notebook_reads_its_studies_or_is_left_out(project, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "STUDIES", {"b": ("{preset}/quality.json",)})
    assert reproduce.reproduce("digits", {}) == 0
    assert "left out: no figures/digits/quality.json" in capsys.readouterr().out
    for rows in ("[1]", "[1, 2]"):  # a changed study is read again
        (project / "figures/digits/quality.json").write_text(rows)
        assert reproduce.reproduce("digits", {}) == 0
        out = capsys.readouterr().out
        assert "left out" not in out and out.count("done") == 1
    assert reproduce.reproduce("digits", {}) == 0
    assert "done" not in capsys.readouterr().out


def test_a_failing_cell_is_named_and_earlier_work_is_kept(project, capsys):
    assert reproduce.reproduce("digits", {"number": "11"}) == 1
    captured = capsys.readouterr()
    assert "b failed in cell" in captured.err and "too large" in captured.err and "AssertionError" in captured.err
    assert "failed" in captured.out and "done" in captured.out
    state = json.loads((project / "runs/digits/reproduce.json").read_text())
    assert list(state) == ["a"]


def test_a_kernel_that_dies_is_a_failure_too(project, capsys):
    path = project / "notebooks" / "b.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = "import os; os._exit(1)"
    nbformat.write(notebook, path)
    assert reproduce.reproduce("digits", {}) == 1
    captured = capsys.readouterr()
    assert "notebook b failed in runs/digits/b.ipynb: Kernel died" in captured.err and "failed" in captured.out


def test_readme_follows_the_regenerated_table(project):
    text = "Table\n<!-- table1 -->\nold\n<!-- /table1 -->\nfloor <!-- floor -->0<!-- /floor -->, end\n"
    (project / "README.md").write_text(text)
    reproduce.update_readme(project)
    assert (project / "README.md").read_text() == text  # there is no table yet
    figures = project / "figures/digits"
    figures.mkdir(parents=True)
    (figures / "table1.json").write_text(
        json.dumps({"protocol": {"floor_random_splits": 1.2345, "floor_random_splits_sd": 0.3}})
    )
    (figures / "table1.md").write_text("| \\1 new |\n")
    reproduce.update_readme(project)
    new = "Table\n<!-- table1 -->\n| \\1 new |\n<!-- /table1 -->\nfloor <!-- floor -->1.23 ± 0.30<!-- /floor -->, end\n"
    assert (project / "README.md").read_text() == new
    marks = "{0}<!-- head_to_head -->{1}<!-- /head_to_head -->\n<!-- deploy -->{2}<!-- /deploy -->\n"
    (project / "README.md").write_text(marks.format(new, "", ""))
    (figures / "deploy_summary.md").write_text("| fast |\n")
    reproduce.update_readme(project)
    assert (project / "README.md").read_text() == marks.format(new, "", "\n| fast |\n")
    (figures / "head_to_head_summary.md").write_text("| near |\n")
    reproduce.update_readme(project)
    assert (project / "README.md").read_text() == marks.format(new, "\n| near |\n", "\n| fast |\n")


def test_unknown_parameters_and_presets_are_refused_before_anything_runs(project):
    with pytest.raises(UserError, match=r"'nunber'.*number, preset"):
        reproduce.reproduce("digits", {"nunber": "1"})
    with pytest.raises(UserError, match="no preset 'digit'"):
        reproduce.reproduce("digit", {})
    assert not (project / "runs").exists()


def test_outside_of_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside a checkout"):
        reproduce.reproduce("digits", {})


def test_what_a_kernel_says_in_pieces_is_shown_whole(capsys):
    said = reproduce._Said()
    for piece in (
        "advkd: wai",
        "ting\na warn",
        "ing\n",
        "\rtrain:  5%|",
        "advkd: again\n",
        "\rtrain: 9%|\radvkd: last\n",
    ):
        said.write(piece)
    assert capsys.readouterr().err == "advkd: waiting\nadvkd: again\nadvkd: last\n"
