"""Foreign code in a child process: channel, limits, clean-up."""
