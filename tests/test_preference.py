"""Votes: blind and balanced questions, a file that lasts, intervals and strengths by hand and on simulated votes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from advkd import preference
from advkd.preference import Panel, Vote, add_vote, bradley_terry, question, read_votes, win_rates
from advkd.presets import UserError

METHODS = ["ADD", "Adv-KD", "regression", "teacher"]


def simulated(strengths: dict[str, float], count: int, seed: int = 0) -> list[Vote]:
    """Votes of somebody who prefers by the model itself."""
    random, votes = np.random.default_rng(seed), []
    for n in range(count):
        left, right, _ = question(list(strengths), "somebody", n)
        odds = math.exp(strengths[left] - strengths[right])
        votes.append(Vote("somebody", n, left, right, left if random.random() < odds / (1 + odds) else right))
    return votes


def test_questions_are_balanced_blind_to_side_and_differ_between_voters():
    asked = [question(METHODS, "a", n) for n in range(600)]
    assert set(Counter(frozenset(q[:2]) for q in asked).values()) == {100}, "each of six pairs equally often"
    lefts = Counter(q[0] for q in asked)
    assert all(250 < count < 350 for count in (2 * n for n in lefts.values())), "no method has a side of its own"
    assert asked == [question(METHODS, "a", n) for n in range(600)]
    assert asked != [question(METHODS, "b", n) for n in range(600)]


def test_votes_last(tmp_path):
    path = tmp_path / "runs" / "votes.csv"
    votes = [Vote("Ann, 2nd", 0, "ADD", "teacher", "ADD"), Vote('"b"', 1, "teacher", "ADD", "ADD")]
    assert read_votes(path) == []
    for vote in votes:
        add_vote(path, vote)
    assert read_votes(path) == votes
    path.write_text("")  # as a power cut may leave another program's file
    add_vote(path, votes[0])
    assert read_votes(path) == votes[:1]


@pytest.mark.parametrize(
    "line",
    ["a,x,ADD,teacher,ADD", "a,1,ADD,teacher,DMD", "a,1,ADD", "a,1,ADD,ADD,ADD", "a,0,ADD,DMD,ADD", "a,1,b,c,b,b"],
)
def test_a_damaged_file_names_the_line(tmp_path, line):
    path = tmp_path / "votes.csv"
    add_vote(path, Vote("a", 0, "ADD", "teacher", "ADD"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"votes\.csv, line 3"):
        read_votes(path)


def test_a_spreadsheets_file_is_read_and_no_table_is_named(tmp_path):
    path, votes = tmp_path / "votes.csv", [Vote("Ann", 0, "ADD", "teacher", "ADD")]
    add_vote(path, votes[0])
    text = path.read_text()
    path.write_text(text.replace("\n", "\r\n") + "\r\n", encoding="utf-8-sig")
    assert read_votes(path) == votes
    for empty in ("\ufeff", "\n", text.splitlines()[0]):
        path.write_text(empty, encoding="utf-8")
        assert read_votes(path) == []
    for other in ("x\n", text.replace(",", ";"), text.replace("pair", "question")):
        path.write_text(other)
        with pytest.raises(UserError, match=r"line 1 is .* but must be 'voter,pair,left,right,winner'"):
            add_vote(path, votes[0])
        assert path.read_text() == other, "what is there is kept"
    path.write_bytes(text.replace("Ann", "Zo\xe9").encode("latin-1"))
    with pytest.raises(UserError, match="is no CSV in UTF-8"):
        Panel({name: torch.zeros(9, 1, 8, 8) for name in "ab"}, path)


def test_the_panel_shows_pairs_from_the_same_noise_and_keeps_votes(tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "PAUSE_S", 0)
    samples = {name: torch.full((20, 1, 16, 16), place / 4) for place, name in enumerate(METHODS)}
    panel, path = Panel(samples, tmp_path / "votes.csv", "Ann"), tmp_path / "votes.csv"
    for n in range(5):
        before = [bytes(image.value) for image in panel.images]
        left, right, _ = question(METHODS, "Ann", n)
        assert before[0].startswith(b"\x89PNG") and before[0] != before[1]
        panel.buttons[n % 2].click()
        assert read_votes(path)[-1] == Vote("Ann", n, left, right, (left, right)[n % 2])
    asks, grids, _ = panel.children
    assert asks.value == preference.QUESTION and grids.layout.grid_gap == f"{preference.GAP_PX}px"
    names = "".join(widget.description for widget in panel.buttons) + panel.said.value
    assert not any(method in names for method in METHODS), "the panel is blind"
    again = Panel(samples, path, "Ann")
    assert again.asked == 5 and Panel(samples, path, "Bob").asked == 0
    again.buttons[0].click()
    panel.buttons[0].click()  # the same question in another window
    assert [vote.pair for vote in read_votes(path)] == [0, 1, 2, 3, 4, 5] and panel.asked == 6


def test_a_double_click_is_one_vote(tmp_path):
    panel = Panel({"a": torch.zeros(9, 3, 8, 8), "b": torch.ones(9, 3, 8, 8)}, tmp_path / "votes.csv")
    panel.shown_at -= 1
    panel.buttons[0].click()
    panel.buttons[0].click()
    assert len(read_votes(tmp_path / "votes.csv")) == 1


def test_a_file_that_was_damaged_meanwhile_is_named_below_the_images(tmp_path):
    path = tmp_path / "votes.csv"
    panel = Panel({"a": torch.zeros(9, 3, 8, 8), "b": torch.ones(9, 3, 8, 8)}, path)
    path.write_text("voter,pair,left,right,winner\nanonymous,zero,a,b,a\n")
    panel.shown_at -= 1
    panel.buttons[0].click()
    assert panel.said.value == f"not counted: {path}, line 2 is no vote; remove it" and panel.asked == 0


@pytest.mark.parametrize("counts", [{"a": 9}, {"a": 9, "b": 10}, {"a": 8, "b": 8}])
def test_a_panel_needs_something_to_show(tmp_path, counts):
    with pytest.raises(UserError, match="must be two methods or more"):
        Panel({name: torch.zeros(n, 1, 8, 8) for name, n in counts.items()}, tmp_path / "votes.csv")


def test_wilson_intervals_by_hand():
    votes = [Vote("v", n, "a", "b", "a" if n < 8 else "b") for n in range(10)]
    (row,) = win_rates(votes)
    z, n, p = 1.959963984540054, 10, 0.8
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (row["method"], row["against"], row["wins"], row["votes"]) == ("a", "b", 8, 10)
    assert row["low"] == pytest.approx((middle - half) / (1 + z**2 / n))
    assert row["high"] == pytest.approx((middle + half) / (1 + z**2 / n))
    (other,) = win_rates(votes, ["b", "c", "a"])
    assert (other["method"], other["against"], other["wins"], other["rate"]) == ("b", "a", 2, 0.2)
    assert other["low"] == pytest.approx(1 - row["high"])
    assert win_rates(votes, ["b"]) == [other], "who is not in the order comes after it"


def test_two_methods_have_the_log_odds_of_their_votes():
    votes = [Vote("v", n, "a", "b", "a" if n < 8 else "b") for n in range(10)]
    a, b = bradley_terry(votes)
    assert (a["method"], b["method"]) == ("a", "b")
    assert a["strength"] - b["strength"] == pytest.approx(math.log(8.5 / 2.5), abs=1e-3)


def test_simulated_votes_give_back_their_strengths():
    wanted = {"ADD": 0.9, "Adv-KD": 0.4, "regression": -1.0, "teacher": -0.3}
    rows = bradley_terry(simulated(wanted, 3000))
    assert [row["method"] for row in rows] == sorted(wanted, key=wanted.get, reverse=True)
    for row in rows:
        assert row["strength"] == pytest.approx(wanted[row["method"]], abs=0.2)
        assert row["low"] < row["strength"] < row["high"]


def test_intervals_are_finite_for_many_methods_that_barely_differ():
    # The curvature is singular along the mean strength, and rounding makes that eigenvalue tiny or negative.
    for many in (3, 7, 12):
        rows = bradley_terry(simulated({f"m{n}": n / 1e3 for n in range(many)}, 60))
        assert all(
            math.isfinite(row["high"] - row["low"]) and row["low"] < row["strength"] < row["high"] for row in rows
        )


def test_who_never_loses_has_a_finite_strength_and_no_votes_is_an_error():
    votes = [Vote("v", n, "a", "b", "a") for n in range(5)]
    first = bradley_terry(votes)[0]
    assert first["strength"] < 3
    reach = 1.96 * math.sqrt(1 / 5.5 + 1 / 0.5) / 2  # of half the log-odds
    assert first["high"] - first["strength"] == pytest.approx(reach, rel=1e-3)
    assert first["strength"] - first["low"] == pytest.approx(reach, rel=1e-3)
    with pytest.raises(UserError, match="no votes"):
        bradley_terry([])
