"""The report, looked at in a browser that has no network."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from parasolver_cli import report
from parasolver_core import SampleRecord
from tests.cli.chromium import Browser, chromium

STEPS, SHOWN = 12, [1, 2, 4]
SLIDER = "document.querySelectorAll('input[type=range]')"


def records() -> list[SampleRecord]:
    """Three rounds of a window of 4 that moves by 4."""
    nodes = [np.arange(first, first + 4) for first in (0, 4, 8)]
    return [SampleRecord(0, one, 4, np.array([1e-4, 1e-3, 1e-2, 1.0]), np.zeros(4), 0.0) for one in nodes]


def picture(level: int) -> np.ndarray:
    return np.full((3, 8, 8, 1), level, dtype=np.uint8)


def stories() -> list[report.Story]:
    frames = [report.grid(picture(level)) for level in (40, 120, 200)]
    ends = {name: report.grid(picture(200)) for name in ("sequential", "parallel", "difference × 100")}
    pictures = report.Story("DDIM-12 <&>", STEPS, 4, SHOWN, frames, [0.3, 0.02, 0.0001], ends, records())
    line = np.stack([np.linspace(-1, 1, 16), np.zeros(16)], axis=1)
    lines = [np.stack([line + np.array([0, height])] * 4) for height in (0.4, 0.2, 0.1)]
    paths = report.Story(
        "Robot paths", STEPS, 4, SHOWN, lines, [0.3, 0.02, 0.0001],
        {"sequential": lines[-1], "parallel": lines[-1]}, records(), [(0, 0, 0.2)] * 4,
    )  # fmt: skip
    return [paths, pictures]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        ["Pendulum </script>", "10000→4", "6.5→0.21 s", "31x faster"],
        ["16 pictures", "50→12", "3.8→6.4 s", "slower"],
    ]
    text = report.page("A title", "First line.\nSecond <b>.", ["", "rounds", "time", "verdict"], rows, stories())
    written = tmp_path_factory.mktemp("report") / "report.html"
    written.write_text(text, encoding="utf-8")
    return written


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as started:
        yield started


def test_the_report_names_no_other_file(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.findall(r"""(?:@import|url\(|fetch\(|import\()""", text)
    assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "Pendulum &lt;/script&gt;" in text
    assert "{{" not in text


def test_the_slider_shows_the_sample_becoming_final(browser: Browser, file: Path, tmp_path: Path) -> None:
    browser.open(file, 1280, 900)
    assert browser.value(f"{SLIDER}.length") == 2
    told = "document.querySelectorAll('output')[1].textContent"
    shown = "document.querySelectorAll('.holder')[1].firstChild.src"
    assert browser.value(told) == "round 4 of 4, less than 0.1 % from the sequential sample, 12 of 12 steps final"
    assert browser.value(shown) == stories()[1].frames[2]
    before = browser.picture(tmp_path / "end.png")
    browser.value(f"{SLIDER}[1].focus()")
    browser.press("ArrowLeft")
    assert browser.value(told) == "round 2 of 4, 2.0 % from the sequential sample, 8 of 12 steps final"
    assert browser.value(shown) == stories()[1].frames[1]
    browser.press("Home")
    assert browser.value(told) == "round 1 of 4, 30 % from the sequential sample, 4 of 12 steps final"
    after = browser.picture(tmp_path / "begin.png")
    with Image.open(tmp_path / "begin.png") as page:
        assert page.width == 1280
    assert before != after
    browser.press("End")
    browser.value("document.activeElement.blur()")
    assert browser.value(told).startswith("round 4 of 4")
    assert browser.problems == []


def test_the_paths_move_with_the_slider(browser: Browser, file: Path) -> None:
    browser.open(file, 1280, 900)
    line = "document.querySelectorAll('.holder')[0].querySelectorAll('polyline')[1].getAttribute('points')"
    assert browser.value(line).split()[0] == "-1,0.1"
    browser.value(f"{SLIDER}[0].focus()")
    browser.press("Home")
    assert browser.value(line).split()[0] == "-1,0.4"


PIXEL = """
(() => {{
  const canvas = document.querySelectorAll('canvas')[1];
  const at = [({step} + 0.5) * canvas.width / 12, ({row} + 0.5) * canvas.height / 3];
  return [...canvas.getContext('2d').getImageData(...at, 1, 1).data].slice(0, 3);
}})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_the_map_tells_final_moving_and_untouched(browser: Browser, file: Path, dark: bool) -> None:
    browser.open(file, 1280, 900, dark)
    final, untouched = [74, 85, 99] if dark else [207, 214, 222], [20, 24, 29] if dark else [255, 255, 255]
    little, much = [63, 143, 232] if dark else [44, 111, 187], [255, 200, 87] if dark else [242, 177, 52]
    assert browser.value(PIXEL.format(step=2, row=1)) == final
    assert browser.value(PIXEL.format(step=10, row=1)) == untouched
    assert browser.value(PIXEL.format(step=4, row=1)) == little
    assert browser.value(PIXEL.format(step=7, row=1)) == much
    assert browser.value("getComputedStyle(document.body).backgroundColor") == f"rgb({', '.join(map(str, untouched))})"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_fits_the_width(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width, 844, dark)
    assert browser.value("document.documentElement.scrollWidth") == width
    texts = "[...document.querySelectorAll('td, th, h2, output, figcaption')].filter(e => e.clientWidth)"
    assert browser.value(f"{texts}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)") == []
    assert browser.problems == []


def test_the_rounds_play(browser: Browser, file: Path) -> None:
    browser.open(file, 1280, 900)
    browser.value("document.querySelectorAll('.play')[1].click()")
    assert browser.value(f"{SLIDER}[1].value") == "0"
    ended = f"new Promise(done => setInterval(() => {SLIDER}[1].value === {SLIDER}[1].max && done(true), 20))"
    assert browser.value(ended) is True
    assert browser.value("document.querySelectorAll('.play')[1].textContent") == "Play"


def test_differences_have_signs_and_a_round_gain() -> None:
    got, expected = np.array([[[[130.0]], [[120.0]], [[125.0]]]]), np.full((1, 3, 1, 1), 125.0)
    gain = report.round_gain(got, expected, 255.0)
    assert gain == 50.0
    brighter, darker, equal = report.differences(got, expected, 20.0)[0, :, 0]
    np.testing.assert_array_equal(brighter, [100, 55, 10])
    np.testing.assert_array_equal(darker, [25, 60, 100])
    np.testing.assert_array_equal(equal, [0, 0, 0])
