"""Training steps of a model, and variants of the step that compute the same."""
