"""Scripts that ask one question of the package each."""
