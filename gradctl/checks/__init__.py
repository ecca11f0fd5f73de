"""What each subcommand decides: a subject in, findings out. Knows no terminal, file or format."""
