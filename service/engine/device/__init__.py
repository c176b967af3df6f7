"""The runner of a device that works by itself while the host prepares the next step."""
