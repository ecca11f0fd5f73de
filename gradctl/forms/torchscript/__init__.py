"""torch.jit.trace and torch.jit.script."""
