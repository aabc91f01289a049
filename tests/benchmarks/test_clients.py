"""The table of clients: each row is a client's own sample and ours, from the same random numbers."""

import pytest

from benchmarks.clients import __main__ as page
from benchmarks.clients.fields import flows_of_torchcfm
from benchmarks.clients.samplers import sampler_of_edm
from benchmarks.clients.table import HEAD, row


def test_a_row_compares_with_the_clients_own_sample() -> None:
    one = next(one for one in sampler_of_edm() if "S_churn=40" in one.name)
    name, lines, window, calls, few, many, near, exact = row(one).strip("| ").split(" | ")
    assert (name, lines, window, calls) == ("EDM edm_sampler, S_churn=40", "2", "16", "79")
    assert int(few) <= int(many) < 50
    assert float(exact) < 1e-5 < float(near) < 1e-2


def test_a_flow_of_torchcfm() -> None:
    one = next(flows_of_torchcfm(), None)
    if one is None:
        pytest.skip("needs torchcfm, as make installs it")
    name, _, _, calls, few, many, near, exact = row(one).strip("| ").split(" | ")
    assert (name, calls) == ("torchcfm OT-CFM, euler, 32 steps", "32")
    assert int(few) <= int(many) < 16
    assert float(exact) < 1e-6 < float(near) < 1e-2


def test_the_page_has_a_place_for_the_table() -> None:
    text = page.PAGE.read_text()
    assert text.index(page.BEGIN) < text.index(HEAD) < text.index(page.END)
