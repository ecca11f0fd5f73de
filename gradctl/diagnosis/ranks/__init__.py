"""Why a model on many ranks computes something else than in one process."""
