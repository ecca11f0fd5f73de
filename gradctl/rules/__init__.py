"""The catalogue of rule codes: one page a code."""
