"""Demonstrations on models and tasks that need no access to the Hub."""
