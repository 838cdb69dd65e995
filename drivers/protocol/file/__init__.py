"""Images that lie in files and on block devices of this host."""
