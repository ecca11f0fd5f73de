"""Custom `autograd.Function`s of a model, judged where it applies them and alone."""
