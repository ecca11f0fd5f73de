"""One program held against another: outcomes, differences, verdicts."""
