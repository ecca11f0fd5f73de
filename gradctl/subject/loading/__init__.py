"""From the text of a command line, a configuration or an object to a Subject."""
