"""What happens to sessions and moments at scale: long runs, and faults in them."""
