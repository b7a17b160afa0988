"""What `invoke eval` hands to the evaluation runner."""
