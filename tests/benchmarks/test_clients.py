"""The table of clients: each row is a client's own sample and ours, from the same random numbers."""

from benchmarks.clients import __main__ as page
from benchmarks.clients.samplers import sampler_of_edm
from benchmarks.clients.table import HEAD, row


def test_a_row_compares_with_the_clients_own_sample() -> None:
    one = next(one for one in sampler_of_edm() if "S_churn=40" in one.name)
    name, lines, window, calls, few, many, near, exact = row(one).strip("| ").split(" | ")
    assert (name, lines, window, calls) == ("EDM edm_sampler, S_churn=40", "2", "16", "79")
    assert int(few) <= int(many) < 50
    assert float(exact) < 1e-5 < float(near) < 1e-2


def test_the_page_has_a_place_for_the_table() -> None:
    text = page.PAGE.read_text()
    assert text.index(page.BEGIN) < text.index(HEAD) < text.index(page.END)
