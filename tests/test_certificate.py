"""The certificate: verdicts on cells, what it is compared with, and that `reproduce` ends with it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from advkd.certificate import DIFFERENT, EXACT, TIME, TOLERANCES, WITHIN, certify, compare
from advkd.figures import save_table

ROOT = Path(__file__).parents[1]
TEACHER, PAPER = {"model": "teacher", "recipe": None}, {"model": "student", "recipe": "paper"}


def verdict(field, committed, found, row=TEACHER):
    (cell,) = [c for c in compare("t", [row | {field: committed}], [row | {field: found}]) if c.field == field]
    return cell.verdict


@pytest.mark.parametrize(
    ("field", "committed", "found", "expected"),
    [
        ("parameters", 1062497, 1062497, EXACT),
        ("parameters", 1062497, 1062498, DIFFERENT),
        ("holds", "yes", "no", DIFFERENT),
        ("fd_train", 0.40, 0.415, WITHIN),
        ("fd_train", 0.40, 0.43, DIFFERENT),
        ("fd_train", 10.0, 10.49, WITHIN),
        ("fd_train", 10.0, 10.51, DIFFERENT),
        ("fd_train", float("nan"), float("nan"), EXACT),
        ("fd_train", 0.4, float("nan"), DIFFERENT),
        ("fd_train", 0.4, None, DIFFERENT),
        ("kid_train", -0.01, 0.004, WITHIN),
        ("ms_per_image", 3.0, 300.0, TIME),
        ("measured_ms_per_image", 3.0, 300.0, TIME),
        ("ms_per_image", 3.0, None, DIFFERENT),
        ("training_steps", 3500, 1000, DIFFERENT),
        ("paper_fd", 142.54, 142.55, DIFFERENT),
    ],
)
def test_a_cell_is_exact_or_near_or_a_time_or_different(field, committed, found, expected):
    assert verdict(field, committed, found) == expected


def test_which_tolerance_holds_follows_from_the_row():
    assert verdict("fd_train", 100.0, 60.0, PAPER) == WITHIN
    assert verdict("fd_train", 100.0, 60.0, TEACHER) == DIFFERENT
    assert verdict("paper_fd", 142.54, 142.55, PAPER) == DIFFERENT, "the paper's own number"


def test_lists_are_compared_number_by_number_and_missing_cells_are_different():
    shares = list(compare("t", [{"shares_digit": [0.1, 0.2, 0.3]}], [{"shares_digit": [0.1, 0.215, 0.9]}]))
    assert [cell.verdict for cell in shares] == [EXACT, WITHIN, DIFFERENT]
    assert [c.verdict for c in compare("t", [{"a": 1}, {"a": 2}], [{"a": 1}])] == [EXACT, DIFFERENT]
    (longer,) = compare("t", [{"shares_digit": [0.1]}], [{"shares_digit": [0.1, 0.2]}])
    assert longer.verdict == DIFFERENT
    renamed = {(c.field, c.verdict) for c in compare("t", [{"b": 1}], [{"c": 1}])}
    assert renamed == {("b", DIFFERENT), ("c", DIFFERENT)}


def test_every_tolerance_says_why_and_allows_no_word():
    assert all(t.why and (t.absolute or t.relative) for t in TOLERANCES)
    assert verdict("fd_note", "near", "far") == DIFFERENT


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one committed table."""
    monkeypatch.chdir(tmp_path)
    save_table([TEACHER | {"fd_train": 0.4, "ms_per_image": 1.0, "steps": 50}], {}, "figures/digits", "table1")
    save_table([{"n": 1}], {}, "figures/digits", "other")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "tables"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_the_certificate_names_what_differs_and_what_it_was_made_by(checkout):
    save_table([TEACHER | {"fd_train": 0.41, "ms_per_image": 2.0, "steps": 40}], {}, "figures/digits", "table1")
    save_table([{"n": 1}], {}, "figures/digits", "new")
    tables = [f"figures/digits/{name}.json" for name in ("table1", "other", "new")]
    path, counts = certify(checkout, "digits", tables)
    assert counts == {EXACT: 3, WITHIN: 1, TIME: 1, DIFFERENT: 1}
    text = path.read_text()
    assert path == checkout / "figures" / "digits" / "certificate.md"
    assert "| table1 | 0 | steps | 50 | 40 | exact |" in text
    assert "| table1 | 0 | fd_train | 0.4 | 0.41 | 0.02 or 5% |" in text
    assert "| **all** | **3** | **1** | **1** | **1** |" in text
    assert "the commit has none: figures/digits/new.json" in text
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    made = dict(line.strip("| ").split(" | ") for line in text.split("## Made by")[1].splitlines() if " | " in line)
    assert made["commit"] == head and made["teacher"] == "9859e07e187a"
    assert made["train images"].startswith("1197, as 8 bits ") and len(made["extractor"]) == 12
    assert {"platform", "python", "torch", "diffusers", "seeds", "threads"} <= made.keys()


def test_without_git_nothing_is_compared_and_the_certificate_says_so(checkout):
    shutil.rmtree(checkout / ".git")
    path, counts = certify(checkout, "digits", ["figures/digits/table1.json"])
    assert (
        sum(counts.values()) == 0 and "Not compared" in path.read_text() and "| commit | no git |" in path.read_text()
    )


def test_the_committed_certificate_is_of_the_tables_that_notebooks_write():
    text = (ROOT / "figures" / "digits" / "certificate.md").read_text()
    for table in ("table1", "submodules", "targets", "int8"):
        assert f"| {table} |" in text
        assert json.loads((ROOT / "figures" / "digits" / f"{table}.json").read_text())["rows"]
    assert "| **all** |" in text and "## Made by" in text
