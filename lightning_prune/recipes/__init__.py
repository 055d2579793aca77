"""What the command line needs to run out of the box: a classifier, reference networks and data modules."""
