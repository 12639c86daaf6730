"""Human preference, as ADD was judged: a panel for blind votes between two methods, and what follows from the votes."""

import csv
import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from advkd.data import batch_generator
from advkd.figures import png
from advkd.files import locked, write_csv
from advkd.presets import UserError

GRID = 3  # images a side of what is shown of a method at a time
SHOWN_PX = 288
GAP_PX = 48  # wider than the gaps within a grid, so that the two are seen as two
QUESTION = "Which of the two grids has the better images?"
PAUSE_S = 0.3  # a second click within it was meant for the pair before


@dataclass(frozen=True)
class Vote:
    """One answer: which method was shown on which side as a voter's `pair`-th question, and which won."""

    voter: str
    pair: int
    left: str
    right: str
    winner: str


def question(methods: Sequence[str], voter: str, n: int) -> tuple[str, str, int]:
    """The n-th question to a voter: the methods on the left and on the right, and a number that picks the samples.

    Every block of questions has each pair of methods once, in an order and on sides that follow from the voter's name.
    """
    pairs = list(itertools.combinations(sorted(methods), 2))
    block, place = divmod(n, len(pairs))
    seed = zlib.crc32(voter.encode())
    order = torch.randperm(len(pairs), generator=batch_generator(seed, block))
    swap, picked = torch.randint(2**20, (2,), generator=batch_generator(seed, block, place)).tolist()
    first, second = pairs[order[place]]
    return (second, first, picked) if swap % 2 else (first, second, picked)


def add_vote(path: Path | str, vote: Vote) -> None:
    """Add a vote to a CSV file, unless the voter has answered that question already."""
    path = Path(path)
    with locked(path):
        votes = read_votes(path)
        if not any((vote.voter, vote.pair) == (v.voter, v.pair) for v in votes):
            write_csv(path, [*votes, vote])


def read_votes(path: Path | str) -> list[Vote]:
    """The votes of a CSV file, none where there is no file or an empty one. Raises UserError that names what is no table of
    votes, a line which is no vote, and one that answers a question again."""
    path, votes, answered = Path(path), [], set()
    if not path.exists():
        return votes
    columns = [field.name for field in fields(Vote)]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet writes the mark in front
            reader = csv.reader(file)
            (_, header), *lines = [(reader.line_num, row) for row in reader if row] or [(1, columns)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8; save it as that, or move it away") from error
    if header != columns:
        raise UserError(f"{path}, line 1 is {','.join(header)!r}, but must be {','.join(columns)!r}, with commas")
    for number, line in lines:
        try:
            row = dict(zip(columns, line, strict=True))
            vote = Vote(**row | {"pair": int(row["pair"])})
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no vote; remove it") from error
        if vote.winner not in (vote.left, vote.right) or vote.left == vote.right:
            raise UserError(f"{path}, line {number}: {vote.winner!r} won where it was not shown; remove the line")
        if (vote.voter, vote.pair) in answered:
            raise UserError(
                f"{path}, line {number}: {vote.voter!r} answers a question again; another voter needs a name"
            )
        answered.add((vote.voter, vote.pair))
        votes.append(vote)
    return votes


class Panel(ipywidgets.VBox):
    """Asks which of two grids of images looks better; methods are named nowhere. Both sides start from the same noise.

    `samples` are images `(n, c, h, w)` in [-1, 1] of every method, made from the same noise in the same order, which the voter
    has not seen beside their names. Votes are added to the CSV file `path`; a voter who comes back is asked the next question.
    Raises UserError for fewer than two methods, for too few images, for different numbers of them and for a damaged file.
    """

    def __init__(self, samples: dict[str, Tensor], path: Path | str, voter: str = "anonymous"):
        counts = {name: len(images) for name, images in samples.items()}
        if len(samples) < 2 or len(set(counts.values())) > 1 or min(counts.values()) < GRID**2:
            raise UserError(
                f"samples are {counts}, but must be two methods or more, of equally many, {GRID**2} or more"
            )
        self.samples, self.path, self.voter = samples, Path(path), voter
        self.images = [ipywidgets.Image(format="png", width=SHOWN_PX, height=SHOWN_PX) for _ in range(2)]
        self.buttons = [ipywidgets.Button(description=f"{side} is better") for side in ("left", "right")]
        self.said = ipywidgets.Label()
        for place, button in enumerate(self.buttons):
            button.on_click(self._on_click(place))
        halves = [ipywidgets.VBox(half) for half in zip(self.images, self.buttons, strict=True)]
        apart = ipywidgets.HBox(halves, layout={"grid_gap": f"{GAP_PX}px"})
        super().__init__([ipywidgets.Label(QUESTION), apart, self.said])
        self._ask()

    def _on_click(self, place: int) -> Callable[[object], None]:
        def click(_: object) -> None:
            try:
                self.vote(place)
            except UserError as error:  # a widget's errors go to a log that nobody sees
                self.said.value = f"not counted: {error}"

        return click

    def vote(self, place: int) -> None:
        """Say that the left (0) or the right (1) of what is shown is better; asks the next question."""
        if time.monotonic() - self.shown_at < PAUSE_S:
            return
        add_vote(self.path, Vote(self.voter, self.asked, *self.pair, self.pair[place]))
        self._ask()

    def _ask(self) -> None:
        self.asked = 1 + max((vote.pair for vote in read_votes(self.path) if vote.voter == self.voter), default=-1)
        *self.pair, picked = question(list(self.samples), self.voter, self.asked)
        for widget, method in zip(self.images, self.pair, strict=True):
            groups = self.samples[method].split(GRID**2)
            groups = [group for group in groups if len(group) == GRID**2]
            widget.value = png(groups[picked % len(groups)], GRID, SHOWN_PX)
        self.said.value = f"{self.asked} answered as {self.voter!r}"
        self.shown_at = time.monotonic()


def win_rates(votes: Sequence[Vote], order: Sequence[str] = ()) -> list[dict]:
    """How often each method won against each other: a row a pair, with Wilson's 95 % interval (Wilson 1927). Each pair is
    named in the order of `order`, before those that it leaves out (alphabetically). Votes count as independent, also those of
    one voter."""
    rows = []
    order = [*order, *sorted({name for vote in votes for name in (vote.left, vote.right)} - set(order))]
    for pair in itertools.combinations(order, 2):
        between = [vote for vote in votes if {vote.left, vote.right} == set(pair)]
        if not between:
            continue
        wins = sum(vote.winner == pair[0] for vote in between)
        interval = binomtest(wins, len(between)).proportion_ci(method="wilson")
        about = {"method": pair[0], "against": pair[1], "votes": len(between), "wins": wins}
        rows.append(about | {"rate": wins / len(between), "low": interval.low, "high": interval.high})
    return rows


def bradley_terry(votes: Sequence[Vote]) -> list[dict]:
    """Methods from best to worst by the model of Bradley and Terry (1952): a wins against b with the log-odds
    `strength` a - `strength` b, whose mean over methods is 0. `low` and `high`: 95 %, by the likelihood's curvature.

    Half a win of each against each other is added, so that one who never lost has a strength too. Votes count as independent,
    also those of one voter. Raises UserError without votes.
    """
    if not votes:
        raise UserError("there are no votes to rank methods by; vote in the panel first")
    methods = sorted({name for vote in votes for name in (vote.left, vote.right)})
    won = [(v.winner, v.left if v.winner == v.right else v.right) for v in votes]
    pairs = [*won, *itertools.permutations(methods, 2)]
    weights = np.repeat([1.0, 0.5], [len(won), len(pairs) - len(won)])
    winners, losers = (np.eye(len(methods))[[methods.index(pair[side]) for pair in pairs]] for side in (0, 1))
    x = winners - losers
    both_ways = (
        np.concatenate([x, -x]),
        np.repeat([1, 0], len(x)),
        np.tile(weights, 2),
    )  # a regression needs two classes
    model = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-8).fit(both_ways[0], both_ways[1], both_ways[2])
    strengths = model.coef_[0] - model.coef_[0].mean()
    odds = expit(x @ strengths)
    information = (x * (weights * odds * (1 - odds))[:, None]).T @ x
    reach = 1.96 * np.sqrt(np.diag(np.linalg.pinv(information, rcond=1e-9, hermitian=True)))
    found = zip(methods, strengths, strengths - reach, strengths + reach, strict=True)
    rows = [dict(zip(("method", "strength", "low", "high"), (name, *map(float, x)), strict=True)) for name, *x in found]
    return sorted(rows, key=lambda row: -row["strength"])
