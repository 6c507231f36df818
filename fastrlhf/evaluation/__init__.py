"""What a trained policy is worth: win rates with intervals, and the report of a run."""
