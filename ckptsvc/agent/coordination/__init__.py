"""The coordinator's shell: elections, the pure core's input and effects, and the way to it from every node."""
