"""Programs that try to deceive gradctl: planted bugs in many places, and right programs that look suspicious.

A planted program is a place (``places``) in which a formula (``functions``) stands with a bug in its backward. Its
clean twin is the same without the bug, and is one of the right programs (``right`` has more). Only ``trial`` knows
gradctl.
"""
