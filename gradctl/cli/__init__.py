"""The command line: one file a subcommand. Processes, files and the terminal are met here; heavy imports are inside."""
