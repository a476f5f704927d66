"""SAEs on disk: our own folder."""
