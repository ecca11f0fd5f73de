"""torch.export, forward and joint."""
