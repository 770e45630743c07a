"""What knows a Lightning trainer."""
