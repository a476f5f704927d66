"""Text in, packed token blocks and residual activations out."""
