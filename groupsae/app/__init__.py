"""The work of a command, given its configuration."""
