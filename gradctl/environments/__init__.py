"""Environments of their own for other versions of torch, in a cache, and the search for the version that changed it."""
