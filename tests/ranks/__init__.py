"""Published mistakes of distributed training, written afresh: a target in each file, with a right twin."""
