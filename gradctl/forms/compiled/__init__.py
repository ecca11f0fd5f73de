"""torch.compile, and AOTAutograd alone."""
