"""What was measured on published data sets, which are not part of this repository."""
