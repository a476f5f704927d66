"""The cost of a run: in FLOPs by formula and by count, in seconds by a stopwatch."""
