"""The report in each format: ``Report`` in, text out. Knows nothing of torch, of checks, or of how numbers were got."""
