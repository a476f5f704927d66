"""What single latents do: where they fire, on which layers, and what explains it."""
