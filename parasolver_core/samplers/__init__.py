"""The sampler as a table: schedules, step rules, the recurrence that they give, and its noise."""
