"""nbdimg: one module for each subcommand, and what they share."""
