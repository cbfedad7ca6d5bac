"""`samestep doctor`: is the step of what is installed here exact, and if not, what to do?"""
