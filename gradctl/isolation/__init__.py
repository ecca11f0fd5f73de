"""Run one unit in a process of its own: its assignment, its answer, its limits, and what it leaves behind."""
