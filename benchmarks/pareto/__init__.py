"""Which method needs the fewest rounds and evaluations for the same true error? ``python -m benchmarks.pareto``.

Every method runs with several tolerances on the same samples; its error is the relative distance to the sequential
sample, so that a method is never judged by what its own tolerance means. Results are kept in a JSON file after every
run, from which an interrupted benchmark goes on.
"""
