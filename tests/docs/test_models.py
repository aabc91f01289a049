"""The models that the documentation names are those of one list, each with the day on which it was looked up."""

import datetime
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = tomllib.loads((ROOT / "docs/models.toml").read_text())
OWNERS = "|".join(sorted({name.split("/")[0] for name in MODELS} | {"stabilityai", "runwayml", "CompVis"}))
TEXTS = {
    path.relative_to(ROOT): path.read_text()
    for pattern in (
        "README.md",
        "docs/*.md",
        "examples/*",
        "benchmarks/*.py",
        "parasolver_cli/*.py",
        "adapters/**/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".ipynb")
}


def _named(text: str) -> set[str]:
    """Names of known owners' models, and whatever is loaded or given as ``--model``."""
    owned = re.findall(rf"\b(?:{OWNERS})/[\w.-]*\w", text)
    loaded = re.findall(r"""(?:from_pretrained\(|--model )["']?([\w-]+/[\w.-]*\w)""", text)
    return {*owned, *loaded}


def test_every_model_named_is_listed() -> None:
    unlisted = {f"{path}: {name}" for path, text in TEXTS.items() for name in _named(text) - set(MODELS)}
    assert not unlisted


def test_every_model_listed_is_named_and_was_looked_up() -> None:
    assert set().union(*map(_named, TEXTS.values())) == set(MODELS)
    for entry in MODELS.values():
        assert datetime.date(2026, 1, 1) <= entry["checked"] <= datetime.date.today()
        assert entry["evidence"].startswith("https://")


def test_a_withdrawn_model_would_be_found() -> None:
    gone = "stabilityai/" + "stable-diffusion-2"
    assert _named(f'from_pretrained("{gone}", dtype=x)') == {gone}
    assert _named('from_pretrained("somebody/some-model")') == {"somebody/some-model"}
