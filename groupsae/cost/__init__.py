"""What a run costs: the cost model in FLOPs, and the stopwatch that measures seconds."""
