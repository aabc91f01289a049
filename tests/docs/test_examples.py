"""The Python blocks of the README and of some pages run as they stand, and print what stands under them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/usage.md",
    "docs/adapters.md",
    "docs/calibration.md",
    "docs/own.md",
    "docs/memory.md",
    "docs/devices.md",
    "docs/wrapping.md",
    "docs/robots.md",
    "docs/samplers.md",
    "docs/structures.md",
    "docs/guided_diffusion.md",
    "docs/dit.md",
    "docs/odeint.md",
)
BLOCKS = [
    pytest.param(code, printed or None, id=f"{page}-{number}")
    for page in PAGES
    for number, (code, printed) in enumerate(
        re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (ROOT / page).read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_block_runs(
    code: str,
    printed: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict[str, object] = {}
    exec(compile(code, "example", "exec"), names)
    assert names["solution"].success  # type: ignore[attr-defined]
    assert printed in (None, capsys.readouterr().out)


def test_code_fits_beside_the_columns_of_the_site() -> None:
    wide = [
        f"{path.name}: {line}"
        for path in (ROOT / "docs").glob("*.md")
        for code in re.findall(
            r"```(?:python|py|bash|{code-block} python)\n(.*?)```", path.read_text(), flags=re.DOTALL
        )
        for line in code.split("\n")
        if len(line) > 88
    ]
    assert not wide


def test_readme_example_finds_the_mean_of_its_data() -> None:
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0], names)
    assert abs(float(names["solution"].sample.mean()) - 2.0) < 0.2  # type: ignore[attr-defined]
