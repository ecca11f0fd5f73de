"""Every test runs on one thread of torch, and so do the processes it starts: tiny tensors gain nothing from more, and
two busy processes lose a lot. Set before torch is imported, which reads it once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
