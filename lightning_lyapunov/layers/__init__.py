"""What a recurrent layer is: torch's own in closed form, and any other module or callable."""
