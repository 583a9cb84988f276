"""The coordinator's decisions, pure: (state, event, now) -> (state, effects with reasons).

Events and orders are the messages of proto/ckptsvc/rpc/v1, so what is decided on is exactly what is on the wire.
Nothing here does I/O or reads a clock: `now` is an argument, in seconds of any monotonic clock.
"""
