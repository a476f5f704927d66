"""The formats of other libraries: one file each, and what they share."""
