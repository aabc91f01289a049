"""What an adapter that lacks a library says, and that nothing is said of one that does not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from parasolver_adapters import extras
from parasolver_adapters.extras import missing


def test_the_first_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    assert missing("json", "numpy") is None
    assert missing("json", "no_such_module", "no_other") == "no_such_module"
    assert missing("no_such_package.part") == "no_such_package.part"
    made = ModuleType("made_by_hand")
    made.__spec__ = None  # which is no reason to look for it
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    assert missing("made_by_hand") is None


def test_a_module_that_lacks_something_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = extras._Watch()
    monkeypatch.setitem(extras.NEEDS, "thing", ("demo", "json", "no_such_module"))
    monkeypatch.setitem(extras.NEEDS, "other", ("demo", "json"))
    with pytest.raises(
        ModuleNotFoundError, match=r"parasolver_adapters\.thing needs no_such_module: pip .*\[demo\]"
    ) as told:
        finder.find_spec("parasolver_adapters.thing")
    assert told.value.name == "no_such_module"
    for name in ("parasolver_adapters.other", "parasolver_adapters.unknown", "elsewhere.thing", "thing"):
        finder.find_spec(name)


def test_modules_are_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [object()])
    for _ in range(2):
        extras.watch()
    assert [isinstance(finder, extras._Watch) for finder in sys.meta_path] == [True, False]
