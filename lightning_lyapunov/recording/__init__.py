"""What the recurrent layers of a running model are called with. It knows modules and hooks, and no trainer."""
