"""Graph optimisation: one file a backend, all of it the work of others, and the table of passes."""
