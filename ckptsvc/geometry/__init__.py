"""Which bytes of which tensor: regions, who holds what, and how to get from one layout to another.

Pure: no I/O, no clock, no torch. All coordinates are in elements of the logical (global) tensor unless a name
says bytes.
"""
