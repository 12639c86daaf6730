"""JupyterLab in a real browser: what readers click. pip has no browser: without a Chromium on the path it is skipped, but
with ADVKD_REQUIRE_BROWSER set, as in CI, it fails."""

import nbformat
from playwright.sync_api import expect

from advkd.preference import read_votes


def test_the_preference_panel_takes_votes_in_jupyterlab(browser, lab, tmp_path):
    cell = """
import torch
from advkd.preference import Panel
Panel({"ADD": torch.zeros(9, 1, 16, 16), "DMD": torch.ones(9, 1, 16, 16)}, "votes.csv", "Ann")
"""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # without one JupyterLab asks
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "panel.ipynb")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(lab.replace("/lab?", "/lab/tree/panel.ipynb?"))
    expect(page.get_by_text("| Idle")).to_be_visible(timeout=120_000)
    page.get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    left, right = (page.get_by_role("button", name=f"{side} is better") for side in ("left", "right"))
    for n, button in enumerate((left, right, left)):
        expect(page.get_by_text(f"{n} answered as 'Ann'")).to_be_visible(timeout=120_000)
        sizes = page.locator(".jp-OutputArea img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert len(sizes) == 2 and min(sizes) > 100, "two images are seen"
        page.wait_for_timeout(500)  # a look at them
        button.click()
    expect(page.get_by_text("3 answered as 'Ann'")).to_be_visible()
    text = page.locator(".jp-OutputArea").inner_text()
    page.screenshot(path=tmp_path / "panel.png")
    assert "ADD" not in text and "DMD" not in text, "the panel is blind"
    votes = read_votes(tmp_path / "votes.csv")
    assert [(v.voter, v.pair, v.winner == v.left) for v in votes] == [
        ("Ann", 0, True),
        ("Ann", 1, False),
        ("Ann", 2, True),
    ]
