"""Circuits: which latents carry a task, and how much of the task they carry."""
