"""Many ranks on the CPU: the model in data or tensor parallelism, or as the user's ``parallelize`` arranges it."""
