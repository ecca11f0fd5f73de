"""Where and why two programs differ."""
