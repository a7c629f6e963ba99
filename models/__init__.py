"""Models and their parallel layers: no launch code, no globals; groups and sizes are arguments."""
