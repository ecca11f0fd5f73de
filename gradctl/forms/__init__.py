"""One way to run a subject a file; the table of them comes with the first static form."""
