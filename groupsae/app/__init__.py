"""What a command does once its configuration is there."""
