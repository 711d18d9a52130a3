"""
Models that score completions and are never trained: teachers and references.

`protocols` says what they can be asked for, `build` makes them of what the user gave, and `routing` sends each row to
the one it belongs to.
"""
