"""What each command decides: subjects or files in, findings out. One verb a file."""
