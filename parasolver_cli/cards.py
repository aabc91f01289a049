"""What networks of real size cost on a graphics card, as ``python -m benchmarks.gpu`` measured it, or as is expected.

``cards.json`` is written by ``python -m benchmarks.gpu.table``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.prediction import Costs


@dataclass(frozen=True)
class CardCosts:
    """The seconds of a call of one network on one card.

    Args:
        card, network: their names.
        measured: whether a card was there; else they were counted.
        costs: by the nodes of a call, guidance counted in, and of the solver in a round.
    """

    card: str
    network: str
    measured: bool
    costs: Costs

    @property
    def source(self) -> str:
        """For the title of a table."""
        how = "measured on" if self.measured else "expected of, and not measured on,"
        return f"{self.network}, {how} an {self.card}"


def card_costs(card: str, network: str | None, graphs: bool) -> CardCosts:
    """What is known of a network on a card.

    Args:
        card: a name such as "h100".
        network: a part of a network's name; None: the first.
        graphs: with its calls captured as CUDA graphs, or launched kernel by kernel.

    Raises:
        ValueError: nothing is known; the message lists what is.
    """
    cards = json.loads(resources.files("parasolver_cli").joinpath("cards.json").read_text())
    if card.lower() not in cards:
        raise ValueError(f"expected one of {', '.join(cards)}, got {card}")
    entry = cards[card.lower()]
    wanted = (network or "").lower()
    beginning = [name for name in entry["networks"] if name.lower().startswith(wanted)]
    fitting = beginning or [name for name in entry["networks"] if wanted in name.lower()]
    if not fitting or (network is not None and len(fitting) > 1):
        several = "is a part of several" if fitting else "is none"
        raise ValueError(f"{network!r} {several} of the networks known: {'; '.join(entry['networks'])}")
    seconds = entry["networks"][fitting[0]]["captured" if graphs else "plain"]
    return CardCosts(entry["card"], fitting[0], entry["measured"], Costs(_table(seconds), _table(entry["own"])))


def _table(seconds: dict[str, float]) -> CostTable:
    return CostTable.of({int(rows): value for rows, value in seconds.items()})
