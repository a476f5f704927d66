"""What the command line asked for: arguments, instantiation, identity of a run, security."""
