"""Published mistakes of the steps of many ranks, for ``compare --steps N --variant fsdp:2``, each with a right twin."""
