"""Many checks in one run, each in a process of its own: configuration, discovery, plan, accepted findings."""
