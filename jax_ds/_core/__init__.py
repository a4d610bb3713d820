"""What every room needs and nothing else: argument checks and settings."""
