"""Adapters: one for each kind of loop that users have."""
