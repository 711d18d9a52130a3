"""The embedded model and the tasks that need no hub."""
