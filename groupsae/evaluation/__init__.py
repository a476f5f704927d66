"""How well SAEs do: reconstruction, effect on the language model, latents, similarity."""
