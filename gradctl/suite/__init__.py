"""Many checks in one run, each in a process of its own: configuration, discovery, isolation, what is accepted."""
