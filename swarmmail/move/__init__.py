"""Moves a service with its data from one host to another: the acts. What comes when is decided in ``model/move.py``."""
