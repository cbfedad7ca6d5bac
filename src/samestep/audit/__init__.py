"""`samestep check`: does a training step depend on how its batch was split, and why?"""
