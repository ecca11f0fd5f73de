"""Graph optimisation: one file for each backend, and the table of passes."""
