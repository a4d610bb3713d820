"""What every room needs and nothing else: checks of arguments, groups of rows, settings."""
