"""From a command line to a model with its inputs: targets, inputs, weights, modes, seeds, and private copies to run."""
