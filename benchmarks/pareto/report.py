"""The tables."""

from __future__ import annotations

from benchmarks.pareto.pictures import COLORS
from benchmarks.pareto.runs import Results
from benchmarks.pareto.settings import ERRORS, IDENTITY, OURS, PUBLISHED, TARGETS


def figure(value: tuple[float, float] | None) -> str:
    """Rounds / evaluations."""
    return "-" if value is None else f"{value[0]:.1f} / {value[1]:.0f}"


def method_table(results: Results) -> list[dict[str, str]]:
    """One row a problem, setting and method, one column an error."""
    rows = []
    for problem, setting in dict.fromkeys((one.problem, one.setting) for one in results.points):
        for method in results.methods(problem, setting):
            row = {"problem": problem, "setting": setting, "method": method}
            rows.append(row | {f"{e:.1%}": figure(results.at(problem, setting, method, e)) for e in ERRORS})
    return rows


def overview(results: Results, error: float) -> list[dict[str, str]]:
    """One row a problem and setting, one column a method: rounds / evaluations at an error."""
    cases = dict.fromkeys((one.problem, one.setting) for one in results.points)
    methods = [one for one in COLORS if any(point.method == one for point in results.points)]
    return [
        {"problem": problem, "setting": setting}
        | {method: figure(results.at(problem, setting, method, error)) for method in methods}
        for problem, setting in cases
    ]


def target_table(results: Results) -> list[dict[str, str]]:
    """One row a target and problem: our share of the baseline's rounds and evaluations."""
    rows = []
    for target in TARGETS:
        for problem in dict.fromkeys(one.problem for one in results.points if one.setting == target.setting):
            ours = results.at(problem, target.setting, OURS, target.error)
            base = results.at(problem, target.setting, target.baseline, target.error)
            row = {"setting": target.setting, "error": f"{target.error:.0%}", "problem": problem}
            row |= {"ours": figure(ours), "baseline": f"{figure(base)} ({target.baseline})"}
            if ours is None or base is None:
                shares, met = ("-", "-"), "not reached"
            else:
                share = (ours[0] / base[0], ours[1] / base[1])
                shares = (f"{share[0]:.2f}", f"{share[1]:.2f}")
                met = "yes" if share[0] <= target.rounds and share[1] <= target.evaluations else "no"
            row |= {
                "rounds": f"{shares[0]} (<= {target.rounds})",
                "evaluations": f"{shares[1]} (<= {target.evaluations})",
            }
            rows.append(row | {"met": met})
    return rows


def worst_excess(results: Results) -> list[dict[str, str]]:
    """Where our rounds exceed the best published method's, at any error: the largest excess first."""
    rows = []
    for problem, setting in dict.fromkeys((one.problem, one.setting) for one in results.points):
        for error in ERRORS:
            ours = results.at(problem, setting, OURS, error)
            others = {m: results.at(problem, setting, m, error) for m in (*PUBLISHED, IDENTITY)}
            reached = {method: value for method, value in others.items() if value is not None}
            if ours is None or not reached:
                continue
            best = min(reached, key=lambda method: reached[method][0])
            rows.append(
                (ours[0] - reached[best][0], problem, setting, error, figure(ours), figure(reached[best]), best)
            )
    names = ("excess", "problem", "setting", "error", "ours", "best other", "method")
    return [
        dict(zip(names, (f"{r[0]:+.1f}", r[1], r[2], f"{r[3]:.1%}", *r[4:]), strict=True))
        for r in sorted(rows, reverse=True, key=lambda r: r[0])
    ]
