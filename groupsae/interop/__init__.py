"""SAEs on disk: our own folder, those of other libraries, and the Hub."""
