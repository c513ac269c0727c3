"""A method is data: the table, the settings of a run, and the plan that the two make together."""
