"""Golden snapshots: the results of a model, kept in a file, and compared with those of another version or machine."""
