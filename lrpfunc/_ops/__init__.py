"""All that is known of torch's operators."""
