"""The table of the page "On a GPU", and what ``parasolver plan --device`` reads: ``python -m benchmarks.gpu.table``.

With the folder of a run on a card, both are what it measured. Without, they are what is expected: counted before a card
was there, and labelled so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

CARDS = Path("parasolver_cli/cards.json")
PAGE = Path("docs/gpu.md")
BEGIN, END = "<!-- table of benchmarks.gpu.table -->\n", "<!-- end of the table -->\n"
NODES = (1, 2, 3, 4, 8, 16, 32, 64)
ROUNDS = "4x64x64, window "  # of the rounds whose own time stands for all
SHORT = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}

# Milliseconds of one node on an H100, plain and captured, and how many nodes a captured call takes in the same time:
# its floor is operations over some 800 TFLOP/s, or bytes of weights over some 3 TB/s; launches take 5 us each.
EXPECTED = {
    "DiT-XL/2, 256 pixels, guidance": (7.0, 1.8, 3),
    "robot 1-D U-Net": (1.8, 0.5, 64),
    "SD 1.5, 512 pixels, guidance": (11.0, 6.0, 1),
    "church DDPM, 256 pixels": (6.0, 3.0, 3),
    "audio DiT, 0.3 B, guidance": (5.0, 2.3, 2),
    "SDXL, 1024 pixels, guidance": (42.0, 38.0, 1),
}

OWN, STEP = 5e-4, 1e-5  # seconds of the solver in a round, whatever the window, and of a bare loop in a step


def expected() -> dict[str, Any]:
    """What is expected of an H100."""
    networks = {}
    for name, (plain, captured, free) in EXPECTED.items():
        calls = {k: max(captured, k * captured / free) for k in NODES}
        networks[name] = {
            "plain": {str(k): round(max(plain, call) / 1e3, 6) for k, call in calls.items()},
            "captured": {str(k): round(call / 1e3, 6) for k, call in calls.items()},
        }
    own = {"1": STEP, "2": OWN, "64": OWN}
    return {"h100": {"card": "NVIDIA H100 80GB HBM3", "measured": False, "own": own, "networks": networks}}


def measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run found; calls that were too long for a graph are taken as they are."""
    machine = next(one for one in lines if one["part"] == "machine")
    if machine["tiny"]:
        raise ValueError("folder: it holds a trial in small on a CPU, of which no table is made")
    networks: dict[str, Any] = defaultdict(lambda: {"plain": {}, "captured": {}})
    for one in lines:
        if one["part"] == "costs" and one["ok"] and "plain" in one:
            own = networks[one["name"]]
            own["plain"][str(one["k"])] = one["plain"] / 1e3
            own["captured"][str(one["k"])] = one.get("captured", one["plain"]) / 1e3
    rounds = [one for one in lines if one["part"] == "rounds" and one["ok"] and one["name"].startswith(ROUNDS)]
    windows = {int(one["name"].removeprefix(ROUNDS).partition(",")[0]): one["own"] / 1e3 for one in reversed(rounds)}
    own = {"1": STEP, "2": min(windows.values(), default=OWN)} | {str(w): windows[w] for w in sorted(windows)}
    name = machine["name"]
    entry = {"card": name, "measured": True, "own": own, "networks": dict(networks)}
    return {SHORT.get(name, name.split()[-1].lower()): entry}


def page_table(cards: dict[str, Any]) -> str:
    """Markdown, two rows a network."""
    text = ""
    for one in cards.values():
        how = "Measured on" if one["measured"] else "**Expected** of, and not measured on,"
        text += f"{how} an {one['card']}; milliseconds of a call with so many nodes.\n\n"
        text += f"| network | calls | {' | '.join(map(str, NODES))} |\n|---|---|{'---|' * len(NODES)}\n"
        for name, costs in one["networks"].items():
            for title, way in ((name, "plain"), ("", "captured")):
                text += f"| {title} | {way} | {' | '.join(_cell(costs[way], str(k)) for k in NODES)} |\n"
        text += "\n"
    return text


def _cell(seconds: dict[str, float], k: str) -> str:
    if k not in seconds:
        return ""
    milliseconds = 1e3 * seconds[k]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def main(folder: Annotated[Path | None, typer.Argument(help="Of a run on a card.")] = None) -> None:
    """Write both; cards that were measured before are kept."""
    found = expected()
    if folder is not None:
        known = json.loads(CARDS.read_text())
        kept = {name: card for name, card in known.items() if card["measured"]}
        lines = (folder / "results.jsonl").read_text().splitlines()
        found = kept | measured([json.loads(line) for line in lines])
    CARDS.write_text(json.dumps(found, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + page_table(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    typer.run(main)
