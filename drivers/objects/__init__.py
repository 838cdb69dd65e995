"""Objects that the user defines beside the images: --object."""
