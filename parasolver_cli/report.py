"""``report.html``: one file with everything in it, which shows how the samples came about, round by round."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from parasolver_cli.watching import moves
from parasolver_core import SampleRecord

SHOWN = 4  # samples whose rounds are shown
_WIDEST = 128  # pixels of a picture in the report; larger ones are scaled down
_LEVELS = 254  # of the map; 255 is "not evaluated"
_FINEST, _COARSEST = 1e-4, 1.0  # moves at the ends of the map's colours


@dataclass(frozen=True)
class Story:
    """What the report tells of one run.

    Args:
        name: of the sampler.
        steps, rounds: of the sequential run, and of the whole batch.
        shown: (frames,), the rounds of the frames.
        frames: the first samples after these rounds; as :func:`grid`, or paths ``(samples, points, 2)``.
        errors: (frames,), distance of the first sample to the sequential one; None: not known.
        pictures: by title, of the whole batch; the same kinds.
        records: of the first sample, one for each of its rounds.
        obstacles: for paths: centre and radius of what each of them passes.
    """

    name: str
    steps: int
    rounds: int
    shown: Sequence[int]
    frames: Sequence[Any]
    errors: Sequence[float] | None
    pictures: dict[str, Any]
    records: Sequence[SampleRecord]
    obstacles: Sequence[Sequence[float]] = ()


def page(title: str, lead: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stories: Sequence[Story]) -> str:
    """The whole file.

    Args:
        title, lead: heading and first sentences.
        columns, rows: of the table of results.
        stories: one for each run that can be looked at.
    """
    files = resources.files("parasolver_cli").joinpath("page")
    parts = {
        "title": html.escape(title),
        "lead": "".join(f"<p>{html.escape(line)}</p>" for line in lead.splitlines()),
        "table": _table(columns, rows),
        "style": files.joinpath("report.css").read_text(encoding="utf-8"),
        "script": files.joinpath("report.js").read_text(encoding="utf-8"),
        "data": json.dumps([_told(story) for story in stories]).replace("</", "<\\/"),
    }
    text = files.joinpath("report.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def grid(pictures: NDArray[np.uint8]) -> str:
    """Pictures ``(count, height, width, 1 or 3)`` in rows, as nearly square as can be, as a data address."""
    return _address(tiled(pictures), int(np.ceil(np.sqrt(len(pictures)))))


def tiled(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All pictures in one, in rows."""
    count, height, width, channels = pictures.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:count] = pictures
    lines = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return lines.reshape(rows * height, columns * width, channels)


def differences(got: NDArray[Any], expected: NDArray[Any], gain: float) -> NDArray[np.uint8]:
    """Signed differences of levels in 0..255, enlarged: black where equal, orange where brighter, else blue."""
    signed = (got.astype(np.float64) - expected).mean(axis=-1, keepdims=True) * gain
    brighter, darker = np.clip(signed, 0, 255), np.clip(-signed, 0, 255)
    orange, blue = np.array([1.0, 0.55, 0.1]), np.array([0.25, 0.6, 1.0])
    return np.round(brighter * orange + darker * blue).clip(0, 255).astype(np.uint8)


def round_gain(got: NDArray[Any], expected: NDArray[Any], full: float) -> float:
    """What differences are multiplied with to be seen: 1, 2 or 5 times a power of ten; a few pixels may be cut off."""
    size = max(float(np.quantile(np.abs(got.astype(np.float64) - expected), 0.995)), full * 1e-6)
    power = 10.0 ** np.floor(np.log10(full / size))
    return max(1.0, float(power * max(step for step in (1, 2, 5) if step * power <= full / size * (1 + 1e-9))))


def _address(picture: NDArray[np.uint8], columns: int) -> str:
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    width = image.width // max(columns, 1)
    if width > _WIDEST:
        image = image.resize((image.width * _WIDEST // width, image.height * _WIDEST // width))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Its cells carry the heading, which a narrow screen shows beside them."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    lines = [
        "<tr>"
        + f'<th scope="row">{html.escape(row[0])}</th>'
        + "".join(
            f'<td data-name="{html.escape(name)}">{html.escape(cell)}</td>'
            for name, cell in zip(columns[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _told(story: Story) -> dict[str, Any]:
    """A story as the script of the page reads it."""
    table = moves(story.records, story.steps)
    scale = np.log(np.clip(table, _FINEST, _COARSEST) / _FINEST) / np.log(_COARSEST / _FINEST)
    levels = np.where(np.isnan(table), 255, np.round(np.nan_to_num(scale) * _LEVELS)).astype(np.uint8)
    reached = [int(one.first + one.accepted) if len(one.nodes) else 0 for one in story.records]
    front = [int(one) for one in np.maximum.accumulate(reached)]
    return {
        "name": story.name,
        "steps": story.steps,
        "rounds": story.rounds,
        "own": len(story.records),
        "shown": [int(one) for one in story.shown],
        "frames": [_points(one) for one in story.frames],
        "errors": None if story.errors is None else [float(one) for one in story.errors],
        "pictures": {name: _points(one) for name, one in story.pictures.items()},
        "map": base64.b64encode(levels.tobytes()).decode(),
        "front": front,
        "obstacles": [list(map(float, one)) for one in story.obstacles],
    }


def _points(frame: Any) -> Any:
    return frame if isinstance(frame, str) else np.round(np.asarray(frame, dtype=np.float64), 3).tolist()
