"""A reader's way through the notebooks: opened in JupyterLab, restarted and run from the top, sliders moved; all in the page."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).parents[1]
# So small that everything takes seconds. Notebook 4 compares halves of the images by 64 features, which needs 130 of them.
FIELDS = {"trajectories": 140, "shard_size": 70, "sampler_steps": 10, "widths": [8, 8], "batch_sizes": [20]}
TRAINED = {"teacher": "teacher", "overrides": json.dumps(FIELDS)}
STEPS = {"steps": 3, "paper_epochs": 0.02}
PARAMETERS = {
    "01_teacher": {"teacher": "teacher"},
    "02_submodules": TRAINED | {"peek_steps": 3},
    "03_train": TRAINED | STEPS,
    "04_evaluate": TRAINED | STEPS | {"count": 140},
}
# Of each slider: a key, how often it is pressed, what the page says then, and which of its pictures have changed.
SLIDERS = {
    "02_submodules": [("ArrowRight", 2, "head 2 imitates state 3, after t = 799; 8 px", [True, True])],
    "03_train": [
        ("End", 1, "head 10 imitates state 11, the final image; 16 px", [True, True]),
        ("ArrowLeft", 4, "Norm of the latent: ", [False, True, False]),
    ],
}
PIXELS = """async images => Promise.all(images.map(async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes).join();
}))"""


@pytest.fixture
def checkout(tmp_path, teacher_folder):
    """A checkout whose notebooks have the small parameters and no outputs; their sources lie in this one."""
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    (tmp_path / "teacher").symlink_to(teacher_folder)
    (tmp_path / "notebooks").mkdir()
    for name, given in PARAMETERS.items():
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += "".join(f"\n{key} = {value!r}" for key, value in given.items())
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def choose(page, menu, item):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=item).click()


def open_notebook(page, name):
    """By a double click in the list of files; returns its panel."""
    page.locator(".jp-DirListing-item", has_text=f"{name}.ipynb").dblclick()
    expect(page.locator(".lm-DockPanel .lm-TabBar-tab.lm-mod-current")).to_contain_text(name)
    expect(page.get_by_text("| Idle")).to_be_visible(timeout=120_000)
    return page.locator(".jp-NotebookPanel:visible")


def run_all(page, notebook, cells):
    """Restart the kernel, run all cells, and wait until each of them has a number of its own."""
    choose(page, "Kernel", "Restart Kernel and Run All Cells…")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    prompts = notebook.locator(".jp-CodeCell .jp-InputPrompt")
    expect(prompts.filter(has_text="[*]").first).to_be_visible(timeout=120_000)
    expect(prompts.filter(has_text="[*]")).to_have_count(0, timeout=300_000)
    expect(page.get_by_text("| Idle")).to_be_visible(timeout=120_000)
    errors = notebook.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)")
    assert not errors.count(), errors.first.inner_text()
    expect(prompts).to_have_text([f"[{n + 1}]:" for n in range(cells)])


def cells_with_figures(name):
    """Of the stored notebook; live curves, whose first drawing comes after 500 steps, left out."""
    code = [c for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    drawn = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    return len(code), [n for n, cell in enumerate(code) if drawn[n] and "live_curves(" not in cell.source]


def move(page, slider, key, times):
    handle = slider.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(times):
        page.keyboard.press(key)


def test_a_reader_restarts_and_runs_every_notebook_and_moves_the_sliders(browser, lab, checkout):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(lab.replace("/lab?", "/lab/tree/notebooks?"))
    for name in PARAMETERS:
        notebook, (cells, figures) = open_notebook(page, name), cells_with_figures(name)
        run_all(page, notebook, cells)
        for n in figures:
            images = notebook.locator(".jp-CodeCell").nth(n).locator(".jp-OutputArea-output img")
            expect(images.first).to_be_visible()
            widths = images.evaluate_all("all => all.map(image => image.naturalWidth)")
            assert min(widths) > 100, f"{name}, code cell {n}: images {widths} pixels wide"
        assert figures, f"{name} draws nothing"
        sliders = notebook.locator(".jp-OutputArea-output", has=page.locator(".noUi-handle"))
        expect(sliders).to_have_count(len(SLIDERS.get(name, [])))
        for n, (key, times, said, changed) in enumerate(SLIDERS.get(name, [])):
            label, images = sliders.nth(n).locator(".widget-label").last, sliders.nth(n).locator("img")
            first, before = label.inner_text(), images.evaluate_all(PIXELS)
            move(page, sliders.nth(n), key, times)
            expect(label).to_contain_text(said)
            expect(label).not_to_have_text(first)
            after = images.evaluate_all(PIXELS)  # the words come after the images
            assert [a != b for a, b in zip(before, after, strict=True)] == changed, f"{name}, slider {n}"
            label.scroll_into_view_if_needed()
            page.screenshot(path=checkout / f"{name}-slider-{n}.png")
        page.screenshot(path=checkout / f"{name}.png")
        choose(page, "Kernel", re.compile("^Shut Down Kernel$"))
        expect(page.get_by_text("| Idle")).to_have_count(0)
