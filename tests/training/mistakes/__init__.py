"""Published mistakes of training steps, written afresh, each with a clean twin."""
