"""Directional derivatives that a model or a file states: JVP and HVP, and forces as those of an energy."""
